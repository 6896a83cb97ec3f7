"""JSON as the contract wants it: what other parsers let pass is refused, and metadata is kept to the byte.

A request is read by walking its top level with the standard library's C scanner, so that the text of `metadata` is
known as the sender wrote it: the response carries that very text, and no number or string can change on the way.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from json.decoder import scanstring  # type: ignore[attr-defined]  # stable since 3.0, absent from typeshed
from typing import Any

MAX_NESTING = 128
"""Arrays and objects inside one another. Far above real requests, far below where parsers overflow their stack."""

_WHITESPACE = re.compile(r"[ \t\n\r]*")
_STRINGS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NOT_BRACKETS = re.compile(r"[^\[\]{}]+")
_ONE_KIND = str.maketrans("{}", "[]")
# What XML 1.0 cannot carry (so SQS and SNS refuse) and JSON does not have to escape.
_UNSAFE = re.compile("[\ufffe\uffff]")
_DIGITS = 4300  # above this CPython refuses to convert a decimal integer, for its cost is quadratic


class WireError(ValueError):
    """Bytes that are not a JSON document as the contract wants it. `metadata` is its text where it could be read."""

    def __init__(self, message: str, *, param: str | None = None, metadata: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.metadata = metadata


@dataclass(slots=True)
class _Scan:
    """One document's reading. Duplicates are noted, not raised, so that the rest is still read."""

    duplicate: str | None = None
    scan: Callable[[str, int], tuple[Any, int]] = field(init=False)
    scan_metadata: Callable[[str, int], tuple[Any, int]] = field(init=False)

    def __post_init__(self) -> None:
        hooks: dict[str, Any] = {
            "object_pairs_hook": self._pairs,
            "parse_constant": _refuse_constant,
            "parse_float": _finite,
        }
        self.scan = json.JSONDecoder(**hooks).scan_once  # type: ignore[attr-defined]  # absent from typeshed
        # The value of a metadata integer is never needed here, only its text, so any length will do.
        self.scan_metadata = json.JSONDecoder(**hooks, parse_int=_any_int).scan_once  # type: ignore[attr-defined]

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self.duplicate = key
                seen.add(key)
        return value


def _refuse_constant(name: str) -> Any:
    raise WireError(f"the request is not JSON: {name} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise WireError(f"the request is not usable as JSON: the number {text[:40]} is too large for a double")
    return value


def _any_int(text: str) -> int | str:
    return int(text) if len(text) <= _DIGITS else text


def _too_deep(text: str) -> bool:
    """Whether brackets nest past the limit; each pass removes one level from the inside."""
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return False
    # Which bracket is which is the parser's business.
    brackets = _NOT_BRACKETS.sub("", _STRINGS.sub("", text)).translate(_ONE_KIND)
    for _ in range(MAX_NESTING):
        if not brackets:
            return False
        brackets = brackets.replace("[]", "")
    return bool(brackets)


def read_object(data: bytes) -> tuple[dict[str, Any], str | None]:
    """Read a request's bytes: its top-level values, and the text of its `metadata` if it has one.

    An integer in metadata of more than 4300 digits stands as a string in the values; in the text it is itself.

    Raises:
        WireError: not UTF-8, not one JSON object, NaN or an infinity, a number past a double's range, a duplicate
            key at any depth, or nested deeper than `MAX_NESTING`.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        raise WireError(f"the request is not UTF-8: {exc.reason} at byte {exc.start}") from exc
    if _too_deep(text):
        raise WireError(f"the request nests deeper than {MAX_NESTING} levels, or its brackets do not match: not JSON")
    try:
        return _walk(text)
    except (StopIteration, IndexError) as exc:
        at = getattr(exc, "value", None)
        raise WireError(f"the request is not JSON: {_place(text, at)}") from exc
    except json.JSONDecodeError as exc:
        raise WireError(f"the request is not JSON: {exc.msg} at character {exc.pos}") from exc
    except WireError:
        raise
    except ValueError as exc:  # CPython's limit on converting long integers
        raise WireError(f"the request is not usable as JSON: an integer of more than {_DIGITS} digits") from exc


def _place(text: str, at: object) -> str:
    if not text.strip():
        return "it is empty"
    return f"a value is missing or malformed at character {at}" if isinstance(at, int) else "it ends too early"


def _walk(text: str) -> tuple[dict[str, Any], str | None]:
    def skip(at: int) -> int:
        return _WHITESPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty string

    reading = _Scan()
    at = skip(0)
    if text[at] != "{":
        reading.scan(text, at)  # raises unless a JSON value starts here
        raise WireError("the request must be a JSON object with metadata and body")
    values: dict[str, Any] = {}
    metadata: str | None = None
    metadata_duplicate = False
    at = skip(at + 1)
    while text[at] != "}":
        if text[at] != '"':
            raise json.JSONDecodeError("a key in double quotes is expected", text, at)
        key, at = scanstring(text, at + 1, True)
        at = skip(at)
        if text[at] != ":":
            raise json.JSONDecodeError("':' is expected", text, at)
        start = skip(at + 1)
        value, end = (reading.scan_metadata if key == "metadata" else reading.scan)(text, start)
        if key == "metadata":
            metadata_duplicate = metadata is not None or reading.duplicate is not None
            metadata = text[start:end]
        if key in values:
            reading.duplicate = key
        values[key] = value
        at = skip(end)
        if text[at] == ",":
            at = skip(at + 1)
            if text[at] == "}":
                raise json.JSONDecodeError("a key in double quotes is expected", text, at)
        elif text[at] != "}":
            raise json.JSONDecodeError("',' or '}' is expected", text, at)
    if skip(at + 1) != len(text):
        raise json.JSONDecodeError("more follows the request's object", text, skip(at + 1))
    if reading.duplicate is not None:
        readable = metadata if isinstance(values.get("metadata"), dict) and not metadata_duplicate else None
        raise WireError(
            f"the request has a duplicate key: {reading.duplicate!r}", param=reading.duplicate, metadata=readable
        )
    return values, metadata


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_ASCII_ENCODER = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def write_json(value: Any) -> str:
    """Write a JSON value as text that every broker carries: UTF-8-encodable, and only characters legal in XML.

    Raises:
        ValueError: NaN, an infinity, a circular reference, or nested too deeply to be written.
        TypeError: a value that is not JSON.
    """
    try:
        text = _ENCODER.encode(value)
    except RecursionError as exc:
        raise ValueError("the value nests too deeply to be written as JSON") from exc
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate: legal as an escape only
        return _ASCII_ENCODER.encode(value)
    return safe_text(text)


def safe_text(text: str) -> str:
    """Escape in JSON text what JSON lets stand but XML 1.0 does not carry. Such characters stand only in strings."""
    return text if text.isascii() else _UNSAFE.sub(_escape, text)
