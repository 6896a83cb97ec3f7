"""What a function returned, as JSON values: models, dataclasses, arrays and bytes are turned into them."""

import base64
from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticSerializationError, to_jsonable_python

from rejoinder.schemas.values import read_value
from rejoinder.schemas.wire import WireError
from rejoinder.worker.engines.protocol import WithHeaders
from rejoinder.worker.errors import NotGiven

_ONE = frozenset({str, int, float, bool, type(None)})
_KEYS = frozenset({str})
_CONTENT_TYPE = "content-type"
_ENCODING = "Content-Transfer-Encoding"


def plain(value: Any) -> Any:
    """The JSON value that a value stands for; one that is JSON already is returned as it is, not copied.

    Pydantic models are dumped by alias; arrays and tensors become lists, dataclasses objects, times and UUIDs
    strings; bytes a string, in base64 where they are no UTF-8.

    Raises:
        NotGiven: it stands for none.
    """
    try:
        return _plain(value)
    except RecursionError as exc:
        raise NotGiven(
            "the function's answer nests too deeply, or contains itself: it cannot be written as JSON"
        ) from exc


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in _ONE:
        return value
    if kind is dict:
        keyed = value if _KEYS.issuperset(map(type, value)) else {_key(key): item for key, item in value.items()}
        if _ONE.issuperset(map(type, keyed.values())):
            return keyed
        return {key: _plain(item) for key, item in keyed.items()}
    if kind is list:
        # In C: a vector of a thousand numbers costs some microseconds.
        return value if _ONE.issuperset(map(type, value)) else [_plain(item) for item in value]
    if kind is tuple:
        return [_plain(item) for item in value]
    return _other(value)


def _key(key: Any) -> str:
    """As `json` writes keys."""
    if isinstance(key, str):
        return str.__str__(key)
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    if isinstance(key, int | float):
        return repr(int(key) if isinstance(key, int) else float(key))
    raise _not_json(key)


def _other(value: Any) -> Any:
    if isinstance(value, str):  # an enum's member above all, whose str() may be its name
        return str.__str__(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _text(bytes(value))[0]
    if isinstance(value, Mapping):
        return _plain(dict(value))
    if callable(tolist := getattr(value, "tolist", None)):  # numpy's and torch's, of which none is imported here
        return _plain(tolist())
    try:
        return _plain(to_jsonable_python(value, fallback=_unknown))
    except (PydanticSerializationError, ValueError) as exc:
        raise _not_json(value) from exc


def _unknown(value: Any) -> Any:
    """What pydantic does not know, inside of what it does."""
    if callable(tolist := getattr(value, "tolist", None)):
        return _plain(tolist())
    raise _not_json(value)


def _not_json(value: Any) -> NotGiven:
    kind = type(value).__qualname__
    return NotGiven(f"the function's answer cannot be written as JSON: a value of type {kind} is in it")


def answer(value: Any) -> Any:
    """What a marked function returned, as `Engine.generate` gives it.

    Raises:
        NotGiven: it is not JSON.
    """
    if isinstance(value, WithHeaders):
        return _with_headers(value.body, value.headers)
    if isinstance(value, bytes | bytearray | memoryview):
        return _with_headers(value, {})
    return plain(value)


def service_answer(value: Any) -> Any:
    """The same of a service's function: of watsonx.ai's `{"headers": ..., "body": ...}` the two are taken apart.

    Raises:
        NotGiven: see `answer`.
    """
    if type(value) is dict and value and value.keys() <= {"headers", "body"}:
        headers = value.get("headers") or {}
        if isinstance(headers, Mapping):
            return _with_headers(value.get("body"), headers)
    return answer(value)


def _with_headers(body: Any, headers: Mapping[Any, Any]) -> Any:
    given = {str(name): str(value) for name, value in headers.items()}
    if isinstance(body, bytes | bytearray | memoryview):
        kind = next((value for name, value in given.items() if name.lower() == _CONTENT_TYPE), "")
        body, encoding = _decoded(bytes(body), kind.partition(";")[0].strip().lower())
        given.update(encoding)
    body = plain(body)
    return WithHeaders(body, given) if given else body


def _decoded(data: bytes, kind: str) -> tuple[Any, dict[str, str]]:
    """Bytes of a media type as a JSON value, and the header that says how, where that is needed."""
    if kind == "application/json" or kind.endswith("+json"):
        try:
            return read_value(data), {}
        except WireError as exc:
            raise NotGiven(f"the function's answer is said to be {kind}, but it {exc}") from exc
    return _text(data) if not kind or kind.startswith("text/") else _base64(data)


def _text(data: bytes) -> tuple[str, dict[str, str]]:
    try:
        return data.decode(), {}
    except UnicodeDecodeError:
        return _base64(data)


def _base64(data: bytes) -> tuple[str, dict[str, str]]:
    return base64.b64encode(data).decode(), {_ENCODING: "base64"}
