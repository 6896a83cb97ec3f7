"""`rejoinder version`."""

from importlib.metadata import version as installed

import typer


def version() -> None:
    """Print the version."""
    typer.echo(f"rejoinder {installed('rejoinder')}")
