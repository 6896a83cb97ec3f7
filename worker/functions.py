"""What a module of your own functions imports: the marks that say what a function is for, its `Context`, its errors.

    from rejoinder.worker.functions import BadRequest, Context, RetryableError, generate, generate_batch, init

    @init
    def load(custom):                      # once in each process; what it returns is `state`
        return Model(**custom)

    @generate_batch("/embed", max_batch_size=64)
    def embed(bodies: list[Text], state):  # validated one by one before they share a call
        return state.encode([body.text for body in bodies])

A marked function is the same function: it can be called and tested like any other. It imports no model and no SDK.
"""

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

from rejoinder.worker.engines.functions.context import Context, Deployment
from rejoinder.worker.engines.protocol import WithHeaders
from rejoinder.worker.errors import BadRequest, RetryableError

__all__ = [
    "BadRequest",
    "Context",
    "Deployment",
    "RetryableError",
    "WithHeaders",
    "generate",
    "generate_batch",
    "generate_stream",
    "init",
]

Kind = Literal["init", "generate", "generate_batch", "generate_stream"]
Function = TypeVar("Function", bound=Callable[..., Any])

_MARKS = "__rejoinder_marks__"
_PATH = re.compile(r"/\S*")


@dataclass(frozen=True, slots=True)
class Mark:
    """What a function is for. What is None is the worker's setting."""

    kind: Kind
    path: str | None = None
    """None: the worker's default path."""
    concurrency: int | None = None
    max_batch_size: int | None = None
    max_batch_bytes: int | None = None
    max_wait_ms: float | None = None
    key: Callable[[Any], Hashable] | None = None


def marks_of(value: Any) -> tuple[Mark, ...]:
    """The marks of a function; of anything else none."""
    try:
        marks = getattr(value, _MARKS, ()) if callable(value) else ()
    except Exception:  # noqa: BLE001  # a proxy among the names of a module, which has nothing behind it yet
        return ()
    return marks if isinstance(marks, tuple) and all(isinstance(mark, Mark) for mark in marks) else ()


def _marked(function: Function, mark: Mark) -> Function:
    if not callable(function):
        raise TypeError(f"@{mark.kind} marks functions: {function!r:.80} is none")
    if isinstance(function, type):
        raise TypeError(f"@{mark.kind} marks functions: {function.__qualname__} is a class")
    try:
        setattr(function, _MARKS, (*marks_of(function), mark))
    except AttributeError as exc:
        raise TypeError(f"@{mark.kind} cannot mark {function!r:.80}: wrap it in a function of your own") from exc
    return function


def init(function: Function) -> Function:
    """Mark what is called once in each process before it takes requests; what it returns is the functions' `state`.

    Its first parameter is the deployment's custom object (`--app-params`): a dict, or what its annotation says, such
    as a pydantic model. A parameter called `context` is the `Context`. Both may be left out. Sync or async.
    """
    return _marked(function, Mark("init"))


@overload
def generate(path: Function, /) -> Function: ...
@overload
def generate(path: str | None = None, *, concurrency: int | None = None) -> Callable[[Function], Function]: ...
def generate(path: Any = None, *, concurrency: int | None = None) -> Any:
    """Mark what answers one request: `generate(body)`, and by name `state` and `context`. Sync or async.

    The body is checked first to be what the parameter's annotation says, such as a pydantic model; `dict` means any
    JSON object. A sync function runs in a thread; an async one on its process's event loop, which it must not block.

    What it returns is the response's body: JSON, or a pydantic model, dataclass, array or tensor. Raise `BadRequest`
    (answered 400) or `RetryableError` (tried again); any other exception is a 500, its traceback is in the log alone.

    Args:
        path: The requests' path; default: the worker's `--default-path`.
        concurrency: Calls at once, in each process. Default: `--app-concurrency`, which such functions share.

    Raises:
        ValueError: an argument is out of its range.
    """
    return _decorator("generate", path, concurrency=concurrency)


@overload
def generate_stream(path: Function, /) -> Function: ...
@overload
def generate_stream(path: str | None = None, *, concurrency: int | None = None) -> Callable[[Function], Function]: ...
def generate_stream(path: Any = None, *, concurrency: int | None = None) -> Any:
    """Mark what answers a request with `options.stream` in chunks: a generator, sync or async. See `generate`.

    Each value that it yields is a chunk, any JSON value.
    """
    return _decorator("generate_stream", path, concurrency=concurrency)


@overload
def generate_batch(path: Function, /) -> Function: ...
@overload
def generate_batch(
    path: str | None = None,
    *,
    max_batch_size: int | None = None,
    max_batch_bytes: int | None = None,
    max_wait_ms: float | None = None,
    key: Callable[[Any], Hashable] | None = None,
    concurrency: int | None = None,
) -> Callable[[Function], Function]: ...
def generate_batch(
    path: Any = None,
    *,
    max_batch_size: int | None = None,
    max_batch_bytes: int | None = None,
    max_wait_ms: float | None = None,
    key: Callable[[Any], Hashable] | None = None,
    concurrency: int | None = None,
) -> Any:
    """Mark what answers the requests that are waiting together: `generate_batch(bodies)`, by name `state`, `contexts`.

    It returns one answer for each body, in their order; an answer may be an exception, which is that request's alone.
    If it raises, the batch is run again in halves until the guilty request is alone: what it did before it raised, it
    does again.

    Args:
        path: See `generate`.
        max_batch_size: Requests in one call. Default: the setting of this name, as of the next two.
        max_batch_bytes: Of their bodies as JSON.
        max_wait_ms: How long a call waits for further requests, in milliseconds.
        key: Of a body; only requests with equal keys share a call.
        concurrency: Calls at once, in each process. Default 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    if key is not None and not callable(key):
        raise ValueError("generate_batch: key should be a function of the body")
    limits = {"max_batch_size": max_batch_size, "max_batch_bytes": max_batch_bytes, "max_wait_ms": max_wait_ms}
    return _decorator("generate_batch", path, concurrency=concurrency, key=key, **limits)


def _decorator(kind: Kind, path: Any, **fields: Any) -> Any:
    if callable(path):  # without parentheses
        return _marked(path, Mark(kind))
    if path is not None:
        path = "/" + path.removeprefix("/") if isinstance(path, str) else path
        if not isinstance(path, str) or not _PATH.fullmatch(path):
            raise ValueError(f"{kind}: path should be a string such as '/embed', not {path!r:.80}")
    for name, value in fields.items():
        if value is not None and name != "key":
            _check_number(kind, name, value)
    mark = Mark(kind, path, **fields)
    return lambda function: _marked(function, mark)


def _check_number(kind: Kind, name: str, value: Any) -> None:
    if name == "max_wait_ms":
        good, allowed = isinstance(value, int | float) and 0 <= value <= 60_000, "a number from 0 to 60000"
    else:
        good, allowed = isinstance(value, int) and value >= 1, "a whole number of at least 1"
    if not good or isinstance(value, bool):
        raise ValueError(f"{kind}: {name} should be {allowed}, not {value!r:.80}")
