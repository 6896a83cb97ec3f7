"""What a function's parameters say: what it wants beside its body, and what its body must be."""

import functools
import inspect
import json
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, JsonValue, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from rejoinder.schemas.problems import first_problem
from rejoinder.worker.engines.functions.context import Context
from rejoinder.worker.errors import BadRequest, EngineGone

Check = Callable[[Any], Any]
"""Takes a body, returns what the function gets. Raises `BadRequest`."""
_ANYTHING = (inspect.Parameter.empty, Any, object, JsonValue)
_OBJECTS: tuple[Any, ...] = (
    *(dict, dict[str, Any], dict[str, object], Mapping, Mapping[str, Any], Mapping[str, object]),
    *(typing.Dict, typing.Dict[str, Any], typing.Mapping, typing.Mapping[str, Any]),  # noqa: UP006  # as some still write
)
_LISTS = (list, Sequence, tuple)
_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)
_MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def parameters(function: Callable[..., Any], name: str) -> list[inspect.Parameter]:
    """Its parameters.

    Raises:
        EngineGone: Python cannot tell them.
    """
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as exc:
        raise EngineGone(f"{name} has no signature that can be read: {exc}") from exc


def wanted(function: Callable[..., Any], name: str, allowed: Collection[str]) -> tuple[inspect.Parameter, list[str]]:
    """The first parameter, which takes the body, and the names of those that are wanted besides.

    Args:
        function: Of the user.
        name: For messages.
        allowed: The names that there may be besides.

    Raises:
        EngineGone: there is no first one, or one that nobody knows a value for.
    """
    all_ = parameters(function, name)
    if not all_ or all_[0].kind not in _POSITIONAL or all_[0].name in allowed:
        raise EngineGone(f"{name} takes no body: its first parameter is that, and may be followed by {_or(allowed)}")
    return all_[0], named(all_[1:], name, allowed)


def named(rest: Sequence[inspect.Parameter], name: str, allowed: Collection[str]) -> list[str]:
    """The names of parameters that are given by name.

    Raises:
        EngineGone: a parameter without a default has a name that is not allowed.
    """
    names = []
    for parameter in rest:
        if parameter.name in allowed and parameter.kind not in {*_MANY, inspect.Parameter.POSITIONAL_ONLY}:
            names.append(parameter.name)
        elif parameter.default is inspect.Parameter.empty and parameter.kind not in _MANY:
            raise EngineGone(
                f"{name} has a parameter {parameter.name!r}: beside the first one it may have {_or(allowed)}"
            )
    return names


def _or(names: Collection[str]) -> str:
    return " and ".join(names) if names else "none"


def annotation_of(function: Callable[..., Any], parameter: inspect.Parameter, name: str) -> Any:
    """What a parameter is annotated with, names in strings looked up.

    Raises:
        EngineGone: a name is not found.
    """
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    inner = inspect.unwrap(function)
    inner = inner.func if isinstance(inner, functools.partial) else inner
    inner = inner if inspect.isroutine(inner) else type(inner).__call__
    local = inspect.getclosurevars(inner).nonlocals if inspect.isfunction(inner) else {}
    # This one alone: others may name what is imported for type checkers only.
    only = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    scope = getattr(inner, "__globals__", {})
    try:
        return typing.get_type_hints(only, scope, dict(local), include_extras=True)[parameter.name]
    except Exception as exc:
        raise EngineGone(f"{name}: the annotation {parameter.annotation!r} cannot be resolved: {exc}") from exc


def item_annotation(annotation: Any, name: str) -> Any:
    """Of the list of bodies that a batch takes, what one of them is.

    Raises:
        EngineGone: it is no list.
    """
    if annotation in _ANYTHING or annotation in _LISTS:
        return Any
    if typing.get_origin(annotation) in _LISTS:
        return typing.get_args(annotation)[0]
    raise EngineGone(f"{name} takes a list of bodies: annotate its first parameter as such, as in list[dict]")


def check_of(annotation: Any, name: str) -> Check | None:
    """What makes sure that a body is what an annotation says; None: there is nothing to make sure of.

    Raises:
        EngineGone: pydantic does not know such a type.
    """
    if any(annotation is one or annotation == one for one in _ANYTHING):
        return None
    if any(annotation == one for one in _OBJECTS):
        return _object
    if annotation is Context:
        raise EngineGone(f"{name} takes no body: its first parameter is that, and the context comes by name after it")
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    except PydanticUserError as exc:
        line = str(exc).partition("\n")[0]
        raise EngineGone(f"{name}: its body cannot be checked as {annotation!r:.100}: {line}") from exc
    model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else BaseModel

    def check(body: Any) -> Any:
        try:
            return adapter.validate_python(body)
        except ValidationError as exc:
            return _as_json(adapter, model, body, exc)

    return check


def _object(body: Any) -> Any:
    if not isinstance(body, dict):
        raise BadRequest("the body: it should be a JSON object")
    return body


def _as_json(adapter: TypeAdapter[Any], model: type[BaseModel], body: Any, problem: ValidationError) -> Any:
    """Once more as JSON: a strict model takes times, enums and tuples from that, and not from what was parsed of it."""
    try:
        return adapter.validate_json(json.dumps(body))
    except ValidationError as exc:
        problem = exc
    except ValueError:  # an integer too long to be written: what was found first is to be said
        pass
    message, param = first_problem(problem, model, body)
    raise BadRequest(message, param=param) from problem
