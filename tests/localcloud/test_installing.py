"""What `localstack/up` needs on the machine: found, installed once and whole, or named."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from local_cloud import install
from local_cloud.errors import CloudError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and requirements that take no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# nothing\n")
    monkeypatch.setattr(install, "REQUIREMENTS", requirements)
    return tmp_path / "rejoinder"


def fake(folder: Path, name: str, script: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def environments(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name != "localstack.lock"]


def test_it_is_installed_once_by_however_many_at_once(cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        pythons = {future.result() for future in [pool.submit(install.localstack_python) for _ in range(4)]}
    assert len(pythons) == 1
    home = pythons.pop()
    assert environments(cache) == [home.parents[1].name]
    made = home.stat().st_ino
    assert install.localstack_python().stat().st_ino == made
    assert subprocess.run([home, "-c", ""], check=False).returncode == 0


def test_other_requirements_are_another_environment(cache: Path) -> None:
    first = install.localstack_python()
    install.REQUIREMENTS.write_text("# nothing more\n")
    assert install.localstack_python() != first


def test_an_installation_that_failed_is_not_taken_for_done(cache: Path) -> None:
    install.REQUIREMENTS.write_text(f"missing @ file:///nowhere/missing-1-py3-none-any.whl --hash=sha256:{'0' * 64}\n")
    with pytest.raises(CloudError, match=r"^cannot install LocalStack: .*missing") as caught:
        install.localstack_python()
    assert "\n" not in str(caught.value)
    assert environments(cache) == []


def test_half_an_environment_is_made_anew(cache: Path) -> None:
    home = install.localstack_python().parents[1]
    (home / "bin" / "python").unlink()
    assert install.localstack_python().exists()


def test_without_uv_it_says_so(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CloudError, match="pip install uv"):
        install.localstack_python()


def test_every_requirement_is_pinned_with_hashes_and_names_no_host() -> None:
    text = install.REQUIREMENTS.read_text()
    entries = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert len(entries) > 100
    assert all("==" in entry and entry.endswith("\\") for entry in entries)
    assert "localstack-core==4.13.1 \\" in entries
    assert "://" not in text


def test_no_gcloud_and_no_emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CloudError, match="gcloud components install pubsub-emulator"):
        install.pubsub_emulator()


def test_gcloud_without_the_emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path / "sdk" / "bin", "gcloud", f"echo {tmp_path / 'elsewhere'}")
    monkeypatch.setenv("PATH", f"{tmp_path / 'sdk' / 'bin'}")
    with pytest.raises(CloudError, match="gcloud has no Pub/Sub emulator: install it with"):
        install.pubsub_emulator()


def test_the_emulator_is_found_where_gcloud_says_its_components_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "elsewhere" / "platform" / "pubsub-emulator" / "bin"
    fake(script, install.EMULATOR, "")
    fake(tmp_path / "bin", "gcloud", f"echo {tmp_path / 'elsewhere'}")
    fake(tmp_path / "bin", "java", "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert install.pubsub_emulator() == [str(script / install.EMULATOR)]


def test_no_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, install.EMULATOR, "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CloudError, match="needs Java"):
        install.pubsub_emulator()
