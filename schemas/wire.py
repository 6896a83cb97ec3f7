"""JSON as the contract wants it: what other parsers let pass is refused, and metadata is kept to the byte."""

import json
import re
from collections.abc import Callable
from json.encoder import c_make_encoder, encode_basestring  # type: ignore[attr-defined]  # stable since 3.0
from typing import Any

from rejoinder.schemas.reading import MAX_NESTING, Document, UnusableError, read_plain, too_deep

# What XML 1.0 cannot carry (so SQS and SNS refuse) and JSON does not have to escape.
_UNSAFE = re.compile("[\ufffe\uffff]")


class WireError(ValueError):
    """Bytes that are not a JSON document as the contract wants it. `metadata` is its text where it could be read."""

    def __init__(self, message: str, *, param: str | None = None, metadata: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.metadata = metadata


def read_object(data: bytes) -> tuple[dict[str, Any], str | None]:
    """Read a request's bytes: its top-level values, and the text of its `metadata` if it has one.

    An integer in metadata of more than 4300 digits stands as a string in the values; in the text it is itself.

    Raises:
        WireError: not UTF-8, not one JSON object, NaN or an infinity, a number past a double's range, a duplicate
            key at any depth, or nested deeper than `MAX_NESTING`. A document that is none by its grammar has no
            metadata; one with a value that cannot be taken has, if that value is not in it.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        raise WireError(f"the request is not UTF-8: {exc.reason} at byte {exc.start}") from exc
    if too_deep(text):
        message = f"the request nests deeper than {MAX_NESTING} levels, or its brackets do not match: not usable JSON"
        raise WireError(message, metadata=_peek(text))
    if (plain := read_plain(text)) is not None:
        return plain
    document = Document(text)
    try:
        document.read()
    except UnusableError as exc:
        raise WireError(str(exc), metadata=document.readable_metadata) from exc
    except TypeError as exc:
        raise WireError(str(exc)) from exc
    except json.JSONDecodeError as exc:
        raise WireError(f"the request is not JSON: {exc.msg} at character {exc.pos}") from exc
    except (StopIteration, IndexError) as exc:
        raise WireError(f"the request is not JSON: {_place(text, exc)}") from exc
    if document.duplicate is not None:
        message = f"the request has a duplicate key: {document.duplicate!r}"
        raise WireError(message, param=document.duplicate, metadata=document.readable_metadata)
    return document.values, document.metadata


def peek_metadata(data: bytes, limit: int) -> str | None:
    """The text of a request's `metadata`, if all of it stands in the first `limit` bytes. Reads no further."""
    return _peek(data[:limit].decode(errors="ignore"))


def _peek(text: str) -> str | None:
    document = Document(text)
    try:
        document.read(until_metadata=True)
    except (ValueError, TypeError, StopIteration, IndexError, RecursionError):
        return None  # the request is refused for another reason; this only looked for what can go with the refusal
    metadata = document.readable_metadata
    return None if metadata is None or too_deep(metadata) else metadata


def _place(text: str, exc: StopIteration | IndexError) -> str:
    if not text.strip():
        return "it is empty"
    at = getattr(exc, "value", None)
    return f"a value is missing or malformed at character {at}" if isinstance(at, int) else "it ends too early"


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
# The encoder that `_ENCODER.encode` makes anew for each value, which takes longer than writing a small one. It has no
# memory of what it is in: a value that contains itself ends in a RecursionError.
_write: Callable[[Any, int], tuple[str, ...]] = c_make_encoder(
    None, _ENCODER.default, encode_basestring, None, ":", ",", False, False, False
)
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
        text = "".join(_write(value, 0))
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
