"""Command-line options made from the settings, so that each setting is described in one place."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from rejoinder.worker.settings import Settings

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="TOML file of settings. Default: rejoinder.toml, if it is there.")
]


def _option_type(annotation: Any) -> Any:
    """The type that the option takes: a list's may be repeated, and None is only the default."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(member for member in get_args(annotation) if member is not NoneType)
    if get_origin(annotation) is Literal or annotation in (str, int, float, bool, Path, list[str]):
        return annotation
    return str


def _flag(value: Any) -> Any:
    """What a setting takes: of a repeated option, the comma-separated text that the environment has too."""
    return (",".join(value) if value else None) if isinstance(value, list) else value


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    if field.is_required() or field.default in (None, []) or "Default:" in text:
        return text
    default = json.dumps(field.default) if isinstance(field.default, bool | dict) else field.default
    return f"{text} [default: {default}]"


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(config, flags)` an option for each setting; one that is not given arrives as None."""

    def wrapped(config: Path | None = None, **flags: Any) -> None:
        command(config, {name: _flag(value) for name, value in flags.items()})

    parameters = [
        inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigOption),
        *(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    _option_type(field.annotation) | None, typer.Option(help=_help(field), show_default=False)
                ],
            )
            for name, field in Settings.model_fields.items()
        ),
    ]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped
