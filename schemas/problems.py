"""Pydantic's validation errors as one sentence that names the field and what is allowed."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

Model = TypeVar("Model", bound=BaseModel)

_OBJECT, _LIST = "a JSON object", "a list"
_JSON_KINDS = {
    "dict_type": _OBJECT,
    "model_type": _OBJECT,
    "model_attributes_type": _OBJECT,
    "dataclass_type": _OBJECT,
    "list_type": _LIST,
    "tuple_type": _LIST,
    "set_type": _LIST,
    "frozen_set_type": _LIST,
}


class Problem(ValueError):
    """A value that its model does not take. `param` is the path of the field at fault; None: the whole value."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


class Strict(BaseModel):
    """A body, or an object in one: nothing is coerced, and an unknown field is refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, value: Any) -> Any:
        """Of many unknown fields leave one: pydantic would make an error of each, gigabytes for a million."""
        if not isinstance(value, dict) or len(value) <= len(cls.model_fields):
            return value
        known = [field.alias or name for name, field in cls.model_fields.items()]
        unknown = next(key for key in value if key not in known)
        return {key: value[key] for key in [*known, unknown] if key in value}


def check(model: type[Model], value: Any) -> Model:
    """Validate `value` as `model`.

    Raises:
        Problem: the first fault, in one sentence that names the field and what is allowed.
    """
    try:
        return model.model_validate(value)
    except ValidationError as exc:
        raise Problem(*first_problem(exc, model, value)) from exc


def _unknown(name: str, model: type[BaseModel]) -> str:
    return f"{name} is not a supported field; known are {', '.join(model.model_fields)}"


def first_problem(exc: ValidationError, model: type[BaseModel], value: Any, prefix: str = "") -> tuple[str, str | None]:
    """Say what is wrong: a message for the sender, and the path of the field at fault (None: the whole value).

    Args:
        exc: What validating `value` as `model` raised.
        model: Its `RULES` (field -> what to say), where it has them, speak for fields of their own.
        value: The JSON value that was validated.
        prefix: The path of `value` itself, such as `options`.
    """
    # Of a union, each member's errors are there: the one that got furthest into the value says most.
    error, path = max(
        (
            (error, _path(error["loc"], value, missing=error["type"] in {"missing", "extra_forbidden"}))
            for error in exc.errors(include_url=False, include_context=False)
        ),
        key=lambda found: len(found[1]),
    )
    param = ".".join([prefix, *map(str, path)] if prefix else map(str, path)) or None
    rules: Mapping[str, str] = getattr(model, "RULES", {})
    name = param or "the body"
    if error["type"] == "missing":
        return f"{name} is missing", param
    if error["type"] == "extra_forbidden":
        return _unknown(name, model) if len(
            path
        ) == 1 and model.model_fields else f"{name} is not a supported field", param
    if path and path[0] in rules:
        return f"{param} {rules[str(path[0])]}", param
    return f"{name}: {said(error)}", param


def said(error: Mapping[str, Any]) -> str:
    """What one of pydantic's errors says of the value, in the words of JSON and not of Python."""
    if (kind := _JSON_KINDS.get(error["type"])) is not None:
        return f"it should be {kind}"
    message: str = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return message.replace("Input should", "it should", 1)


def _path(loc: tuple[int | str, ...], value: Any, *, missing: bool) -> list[int | str]:
    """The part of `loc` that exists in `value`: pydantic also puts the names of union members there."""
    path: list[int | str] = []
    for step in loc:
        if _has(value, step):
            value = value[step]
        elif not (missing and step == loc[-1]):
            continue
        path.append(step)
    return path


def _has(value: Any, step: int | str) -> bool:
    if isinstance(value, dict):
        return step in value
    return isinstance(value, list) and isinstance(step, int) and step < len(value)
