"""`rejoinder config`: each setting, its value and where it comes from."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from rejoinder.cli.errors import ExitCode, Failure
from rejoinder.cli.options import with_settings
from rejoinder.worker.settings import SECRETS, Settings, SettingsError, gather, resolve


@with_settings
def config(config: Path | None, flags: dict[str, Any]) -> None:
    """Show each setting, its value and where it comes from: a flag, the environment, a file or the default.

    Takes the options of `rejoinder worker`. Settings that the worker needs and nobody gave are shown as missing.
    """
    try:
        _show(*gather(flags, config=config))
        resolve(flags, config=config)  # says what is missing or not allowed
    except SettingsError as exc:
        raise Failure(str(exc), ExitCode.USAGE) from exc


def _show(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    rows = [
        (name, _text(name, values[name]) if name in values else _default(name), origins.get(name, _unset(name)))
        for name in Settings.model_fields
    ]
    if sys.stdout.isatty():
        table = Table("setting", "value", "from", box=None)
        for row in rows:
            table.add_row(*row, style=None if row[2] != "default" else "dim")
        Console().print(table)
    else:
        for row in rows:
            typer.echo("\t".join(row))


def _text(name: str, value: Any) -> str:
    if name in SECRETS:
        return "**********"
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _default(name: str) -> str:
    field = Settings.model_fields[name]
    return "" if field.is_required() or field.default is None else _text(name, field.default)


def _unset(name: str) -> str:
    return "missing" if Settings.model_fields[name].is_required() else "default"
