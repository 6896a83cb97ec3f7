"""The way with containers. Where no engine is, docker is a script that writes down what it is asked."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from local_cloud import containers
from local_cloud.command import AWS_PORT, PUBSUB_PORT, main
from local_cloud.resources import PROJECT
from local_cloud.services import AWS_SERVICES, HOST, localstack

COMPOSE: dict[str, Any] = yaml.safe_load(containers.FILE.read_text())
DOCKER = """#!/bin/sh
echo "$REJOINDER_AWS_PORT:$REJOINDER_PUBSUB_PORT $*" >>"{asked}"
case "$*" in
  *" ps "*) [ ! -e "{folder}/up" ] || echo container ;;
  *" up "*) touch "{folder}/up" ;;
  *" down "*) rm "{folder}/up" ;;
esac
"""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What docker was asked, in a file; state in a folder of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    script = tmp_path / "docker"
    script.write_text(DOCKER.format(asked=tmp_path / "asked", folder=tmp_path))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "asked"


def test_the_ports_are_those_of_the_commands_and_only_this_machine_s() -> None:
    ports = {name: service["ports"] for name, service in COMPOSE["services"].items()}
    aws, pubsub = containers.PORT_VARIABLES
    assert ports == {
        "localstack": [f"{HOST}:${{{aws}:-{AWS_PORT}}}:4566"],
        "pubsub": [f"{HOST}:${{{pubsub}:-{PUBSUB_PORT}}}:8085"],
    }


def test_the_images_are_pinned_and_their_health_is_asked() -> None:
    for service in COMPOSE["services"].values():
        assert re.fullmatch(r"[a-z/-]+:\d+\.\d+\.\d+(-emulators)?", service["image"])
        assert service["healthcheck"]["test"][:3] == ["CMD", "curl", "-fs"]


def test_the_services_and_the_project_are_those_of_the_processes(tmp_path: Path) -> None:
    environment = COMPOSE["services"]["localstack"]["environment"]
    assert environment["SERVICES"] == ",".join(AWS_SERVICES)
    processes = localstack(AWS_PORT, tmp_path).environment
    assert environment.items() <= processes.items()
    assert f"--project={PROJECT}" in COMPOSE["services"]["pubsub"]["command"]


def test_up_and_down_ask_docker_compose(
    aws: str, gcp: str, asked: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulators of the tests stand in for the containers."""
    ports = (str(urlsplit(aws).port), gcp.rpartition(":")[2])
    monkeypatch.setattr("local_cloud.command.refuse_taken", lambda *_: None)
    assert main(["up", "--aws-port", ports[0], "--pubsub-port", ports[1], "--env"]) == 0
    assert f"export AWS_ENDPOINT_URL={aws}\n" in capsys.readouterr().out
    assert main(["up"]) == 0
    assert main(["down"]) == 0
    assert main(["down"]) == 0
    lines = asked.read_text().splitlines()
    compose = f"compose --file {containers.FILE}"
    assert [line for line in lines if " up " in line] == [f"{':'.join(ports)} {compose} up --detach --wait"] * 2
    assert [line for line in lines if " down " in line] == [f": {compose} down --volumes --timeout 10"]


def test_compose_that_fails_is_one_line(
    asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docker").write_text('#!/bin/sh\ncase "$*" in *" up "*) echo "no such image" >&2; exit 1;; esac\n')
    monkeypatch.setattr("local_cloud.command.refuse_taken", lambda *_: None)
    assert main(["up", "--containers"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("localstack/up: `docker compose up` failed: no such image; ")


@pytest.mark.parametrize(
    ("script", "missing"),
    [
        (None, "no docker on the PATH"),
        ("exit 1", "no Docker engine answers"),
        ('[ "$1" != compose ]', "docker has no compose plugin"),
    ],
)
def test_what_is_missing_for_containers_is_named(
    script: str | None,
    missing: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if script is not None:
        (tmp_path / "docker").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert main(["up", "--containers"]) == 1
    assert capsys.readouterr().err == f"localstack/up: no containers can be started: {missing}\n"
