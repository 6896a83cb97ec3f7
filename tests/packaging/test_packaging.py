"""The tree is what its packaging says: links, packages, settings page, commands."""

import tomllib
from pathlib import Path

import pytest
from settings_page import page

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("adapters", "cli", "client", "schemas", "worker")


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_type_checkers_link_resolves(folder: str) -> None:
    link = ROOT / "typings" / "rejoinder" / folder
    assert link.is_symlink()
    assert not Path(link.readlink()).is_absolute()
    assert link.resolve() == ROOT / folder


def test_only_links_are_in_typings() -> None:
    assert sorted(path.name for path in (ROOT / "typings" / "rejoinder").iterdir()) == sorted(FOLDERS)


def test_every_package_is_listed_and_typed() -> None:
    found = {
        "rejoinder." + ".".join(init.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found
    assert set(PROJECT["tool"]["setuptools"]["package-dir"]) == {f"rejoinder.{folder}" for folder in FOLDERS}
    assert all((ROOT / folder / "py.typed").exists() for folder in FOLDERS)


def test_each_dependency_has_its_reason() -> None:
    reasons = (ROOT / "docs" / "dependencies.md").read_text()
    groups = [
        *PROJECT["project"]["dependencies"],
        *(entry for extra in PROJECT["project"]["optional-dependencies"].values() for entry in extra),
        *(entry for group in PROJECT["dependency-groups"].values() for entry in group),
    ]
    for entry in groups:
        name = entry.partition("[")[0].partition("=")[0].partition(">")[0]
        assert name == "rejoinder" or name in reasons, f"{name} has no line in docs/dependencies.md"


def test_the_settings_page_is_that_of_the_settings() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == page(), "run: uv run python tests/support/settings_page.py"


def test_ci_runs_the_readme_s_test_command() -> None:
    command = "pip install uv && uv run pytest"
    assert command in (ROOT / "README.md").read_text()
    assert command.replace("install uv", "install -q uv") in (ROOT / ".ci" / "run").read_text()


def test_no_file_names_a_registry_or_a_machine() -> None:
    for line in (ROOT / "deploy" / "requirements.txt").read_text().splitlines():
        assert "://" not in line
        assert not line.strip().startswith(("--index", "-i ", "--find-links"))
