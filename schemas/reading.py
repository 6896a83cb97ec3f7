"""Reading a request's text: a walk over its top level with the standard library's C scanner.

No parser at hand does this: it tells where the text of `metadata` stands, so that the response can carry that very
text, notes duplicate keys at any depth, and refuses what other parsers let pass.
"""

import json
import re
from collections.abc import Callable
from itertools import accumulate
from json.decoder import scanstring  # type: ignore[attr-defined]  # stable since 3.0, absent from typeshed
from typing import Any

MAX_NESTING = 128
"""Arrays and objects inside one another. Far above real requests, far below where parsers overflow their stack."""
MAX_DIGITS = 4300
"""Above this CPython refuses to convert a decimal integer, for its cost is quadratic."""

_WHITESPACE = re.compile(r"[ \t\n\r]*")
# A key as nearly all are, with what stands around it up to its value: one match in place of several steps.
_PLAIN_KEY = re.compile(r'"([^"\\\x00-\x1f]*+)"[ \t\n\r]*:[ \t\n\r]*')
# A string that nothing closes matches to its end: failing there, the search would begin again at each of its quotes,
# and a few hundred kilobytes of them would take minutes.
_STRINGS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_NOT_BRACKETS = re.compile(r"[^\[\]{}]+")
_DEPTH = {"[": 1, "{": 1, "]": -1, "}": -1}
_DEPTH_CHUNK = 1 << 16


Scan = Callable[[str, int], tuple[Any, int]]
"""Reads the value that starts at a place of a text; returns it, and where it ends."""


class UnusableError(ValueError):
    """JSON by its grammar, or nearly, but with a value that cannot be taken: NaN, an infinity, a number too long."""


def _refuse_constant(name: str) -> Any:
    raise UnusableError(f"the request is not JSON: {name} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise UnusableError(f"the request is not usable as JSON: the number {text[:40]} is too large for a double")
    return value


def _too_long(text: str) -> bool:
    return len(text) > MAX_DIGITS and len(text.removeprefix("-")) > MAX_DIGITS


def _int(text: str) -> int:
    if _too_long(text):
        raise UnusableError(f"the request is not usable as JSON: an integer of more than {MAX_DIGITS} digits")
    return int(text)


def _any_int(text: str) -> int | str:
    # The value of a metadata integer is never needed, only its text, so any length will do.
    return text if _too_long(text) else int(text)


class _DuplicateError(Exception):
    """An object has a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _DuplicateError
    return value


def _scanners(pairs_hook: Callable[[list[tuple[str, Any]]], dict[str, Any]]) -> tuple[Scan, Scan]:
    """One for all values but `metadata`, one for that."""
    hooks: dict[str, Any] = {
        "object_pairs_hook": pairs_hook,
        "parse_constant": _refuse_constant,
        "parse_float": _finite,
    }
    decoders = json.JSONDecoder(**hooks, parse_int=_int), json.JSONDecoder(**hooks, parse_int=_any_int)
    scan, scan_metadata = (decoder.scan_once for decoder in decoders)  # type: ignore[attr-defined]
    return scan, scan_metadata


# Made once: that takes as long as reading a small request.
_UNIQUE_SCANNERS = _scanners(_unique)


# Integers by CPython's own hand: it refuses those of too many digits too, and reads all others faster.
_PLAIN_SCAN: Scan = json.JSONDecoder(  # type: ignore[attr-defined]
    object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
).scan_once
# What stands between the key and its value.
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")


def read_plain(text: str) -> tuple[dict[str, Any], str] | None:
    """Read a request as nearly all are in one scan: its top-level values, and the text of its metadata.

    None for any other, whatever is wrong or unusual with it: `Document` reads those. That `"metadata"` stands but once
    tells where the value of the key is, unless the key itself is written with escapes.
    """
    if text.count('"metadata"') != 1 or "\\u006" in text or "\\u007" in text or text[0] != "{":
        return None
    try:
        values, end = _PLAIN_SCAN(text, 0)
        if end != len(text) or not isinstance(values.get("metadata"), dict):
            return None
        start = _COLON.match(text, text.index('"metadata"') + 10).end()  # type: ignore[union-attr]  # a colon follows
        return values, text[start : _PLAIN_SCAN(text, start)[1]]
    except (ValueError, StopIteration, RecursionError, _DuplicateError):
        return None


def too_deep(text: str) -> bool:
    """Whether brackets nest past the limit. Which kind of bracket it is, is the parser's business."""
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return False
    brackets = _NOT_BRACKETS.sub("", _STRINGS.sub("", text))
    depth = 0
    for at in range(0, len(brackets), _DEPTH_CHUNK):  # in pieces, between which other threads may run
        depths = list(accumulate(map(_DEPTH.__getitem__, brackets[at : at + _DEPTH_CHUNK]), initial=depth))
        if max(depths) > MAX_NESTING:
            return True
        depth = depths[-1]
    return False


class Document:
    """One request's text as it is read."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.values: dict[str, Any] = {}
        """The top-level values. An integer of metadata with more than `MAX_DIGITS` digits stands as a string."""
        self.metadata: str | None = None
        """The text of `metadata`, once it was passed."""
        self.duplicate: str | None = None
        """A key that stands twice in one object, at any depth. Noted, not raised, so that the rest is still read."""
        self._metadata_duplicate = False

    @property
    def readable_metadata(self) -> str | None:
        """The text of `metadata` where it is one whole object without duplicate keys."""
        whole = isinstance(self.values.get("metadata"), dict) and not self._metadata_duplicate
        return self.metadata if whole else None

    def read(self, *, until_metadata: bool = False) -> None:
        """Read to the end, or until `metadata` was read.

        Raises:
            UnusableError: a value that cannot be taken.
            json.JSONDecodeError, StopIteration, IndexError: not JSON, from the scanner or from here; the last two
                where the text ends too early or no value starts.
            TypeError: JSON, but not an object.
        """
        try:
            self._read(*_UNIQUE_SCANNERS, until_metadata)
        except _DuplicateError:
            self.values, self.metadata, self.duplicate, self._metadata_duplicate = {}, None, None, False
            self._read(*_scanners(self._pairs), until_metadata)

    def _read(self, scan: Scan, scan_metadata: Scan, until_metadata: bool) -> None:
        text, skip = self._text, self._skip
        at = skip(0)
        if text[at] != "{":
            scan(text, at)  # raises unless a JSON value starts here
            raise TypeError("the request must be a JSON object with metadata and body")
        at = skip(at + 1)
        while text[at] != "}":
            plain = _PLAIN_KEY.match(text, at)
            key, start = (plain[1], plain.end()) if plain else self._key(at)
            value, at = (scan_metadata if key == "metadata" else scan)(text, start)
            self._take(key, value, text[start:at] if key == "metadata" else None)
            if until_metadata and key == "metadata":
                return
            at = self._next_key(skip(at))
        if skip(at + 1) != len(text):
            raise json.JSONDecodeError("more follows the request's object", text, skip(at + 1))

    def _key(self, at: int) -> tuple[str, int]:
        """The key that starts at `at`, whatever it is, and where its value does."""
        if self._text[at] != '"':
            raise json.JSONDecodeError("a key in double quotes is expected", self._text, at)
        key, at = scanstring(self._text, at + 1, True)
        at = self._skip(at)
        if self._text[at] != ":":
            raise json.JSONDecodeError("':' is expected", self._text, at)
        return key, self._skip(at + 1)

    def _take(self, key: str, value: Any, metadata: str | None) -> None:
        if metadata is not None:
            self._metadata_duplicate = self.metadata is not None or self.duplicate is not None
            self.metadata = metadata
        if key in self.values:
            self.duplicate = key
        self.values[key] = value

    def _next_key(self, at: int) -> int:
        """From the end of a value to the next key's quote, or to the brace that closes the object."""
        if self._text[at] == ",":
            at = self._skip(at + 1)
            if self._text[at] != "}":
                return at
            raise json.JSONDecodeError("a key in double quotes is expected", self._text, at)
        if self._text[at] != "}":
            raise json.JSONDecodeError("',' or '}' is expected", self._text, at)
        return at

    def _skip(self, at: int) -> int:
        if self._text[at : at + 1] > " ":  # the usual case
            return at
        return _WHITESPACE.match(self._text, at).end()  # type: ignore[union-attr]  # it matches the empty string

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self.duplicate = key
                seen.add(key)
        return value
