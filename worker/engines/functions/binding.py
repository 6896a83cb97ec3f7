"""A user's function made ready to be called: what it takes is known, and what it gives is JSON."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rejoinder.worker.engines.functions.context import Deployment
from rejoinder.worker.engines.functions.results import answer, plain, service_answer
from rejoinder.worker.engines.functions.signatures import (
    Check,
    annotation_of,
    check_of,
    item_annotation,
    parameters,
    wanted,
)
from rejoinder.worker.errors import BadRequest, EngineGone
from rejoinder.worker.functions import Kind, Mark

REFERENCES = ("input_data_references", "output_data_reference")
"""What a watsonx.ai batch job is of."""


@dataclass(frozen=True, slots=True)
class Function:
    """One function of the user's."""

    name: str
    mark: Mark
    asynchronous: bool
    contextual: bool
    """Whether it wants contexts."""
    check: Check | None
    """Turns a request's body into what it takes."""
    call: Callable[[Any, Any], Any]
    """Calls it with what `check` returned and a context; a batch: with lists of both."""
    give: Callable[[Any], Any]
    """Turns one answer, or chunk, into JSON."""
    key: Callable[[Any, Any], Any] | None = None
    """A batch's key of what `check` returned and a context."""
    job: bool = False


def is_async(function: Any) -> bool:
    """Whether it runs on the event loop."""
    return _is(function, inspect.iscoroutinefunction) or _is(function, inspect.isasyncgenfunction)


def _is(function: Any, what: Callable[[Any], bool]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return what(function) or what(getattr(function, "__call__", None))  # noqa: B004  # of an object that is called


def _check_kind(function: Any, kind: Kind, name: str) -> None:
    yields = _is(function, inspect.isgeneratorfunction) or _is(function, inspect.isasyncgenfunction)
    if kind != "generate_stream" and yields:
        raise EngineGone(f"{name} yields: a {kind} returns its answer, and what yields is a generate_stream")


def marked(function: Callable[..., Any], mark: Mark, name: str, deployment: Deployment) -> Function:
    """A function that a mark says the use of.

    Raises:
        EngineGone: its parameters are not what such a function may have.
    """
    _check_kind(function, mark.kind, name)
    batch = mark.kind == "generate_batch"
    context = "contexts" if batch else "context"
    first, names = wanted(function, name, ("state", context))
    annotation = annotation_of(function, first, name)
    check = check_of(item_annotation(annotation, name) if batch else annotation, name)
    by_body = mark.key
    return Function(
        name,
        mark,
        is_async(function),
        context in names,
        check,
        _bound(function, names, context, deployment),
        plain if mark.kind == "generate_stream" else answer,
        None if by_body is None else lambda body, _: by_body(body),
    )


def _bound(
    function: Callable[..., Any], names: list[str], context: str, deployment: Deployment
) -> Callable[[Any, Any], Any]:
    """Calls it with the body, and by name with what it wants besides. Nothing is built where it wants nothing."""
    if not names:
        return lambda body, _: function(body)
    if names == ["state"]:
        return lambda body, _: function(body, state=deployment.state)
    if names == [context]:
        return lambda body, given: function(body, **{context: given})
    return lambda body, given: function(body, **{context: given}, state=deployment.state)


def of_service(function: Callable[..., Any], mark: Mark, name: str) -> Function:
    """A closure that a service returned: it takes a context, or a job's references.

    Raises:
        EngineGone: it takes neither.
    """
    _check_kind(function, mark.kind, name)
    taken = [parameter.name for parameter in parameters(function, name)]
    if mark.kind == "generate_batch" and REFERENCES[0] in taken:
        return _job(function, mark, name)
    try:
        inspect.signature(function).bind(None)
    except TypeError as exc:
        what = "contexts, or input_data_references and output_data_reference"
        what = f"a list of {what}" if mark.kind == "generate_batch" else "the context alone"
        raise EngineGone(f"{name} of the service should take {what}: {exc}") from exc
    by_context = mark.key
    return Function(
        name,
        mark,
        is_async(function),
        True,
        None,
        lambda _, context: function(context),
        plain if mark.kind == "generate_stream" else service_answer,
        None if by_context is None else lambda _, context: by_context(context),
    )


def _job(function: Callable[..., Any], mark: Mark, name: str) -> Function:
    signature = inspect.signature(function)
    try:
        signature.bind(**dict.fromkeys(name for name in REFERENCES if name in signature.parameters))
    except TypeError as exc:
        raise EngineGone(f"{name} of the service should take {' and '.join(REFERENCES)} alone: {exc}") from exc
    needed = [parameter for parameter in signature.parameters.values() if parameter.name in REFERENCES]

    def check(body: Any) -> dict[str, Any]:
        if not isinstance(body, dict):
            raise BadRequest(f"the body: it should be a JSON object with {' and '.join(REFERENCES)}")
        scoring = body.get("scoring")
        prefix, source = ("scoring.", scoring) if isinstance(scoring, dict) else ("", body)
        return _references(source, needed, prefix)

    def call(references: Mapping[str, Any], _: Any) -> Any:
        return function(**references)

    return Function(name, mark, is_async(function), False, check, call, service_answer, job=True)


def _references(source: Mapping[str, Any], needed: list[inspect.Parameter], prefix: str) -> dict[str, Any]:
    given = {}
    for parameter in needed:
        if parameter.name in source:
            given[parameter.name] = source[parameter.name]
        elif parameter.default is inspect.Parameter.empty:
            raise BadRequest(f"{prefix}{parameter.name} is missing", param=f"{prefix}{parameter.name}")
    for name, kind in zip(REFERENCES, (list, dict), strict=True):
        if name in given and given[name] is not None and not isinstance(given[name], kind):
            what = "a list of objects" if kind is list else "an object"
            raise BadRequest(f"{prefix}{name}: it should be {what}", param=f"{prefix}{name}")
    return given
