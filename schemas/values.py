"""JSON that stands by itself, such as an input object or one of its lines: read as strictly as a request."""

import json
import re
from codecs import BOM_UTF8
from typing import Any

from rejoinder.schemas.reading import MAX_NESTING, UnusableError, _scanners, too_deep
from rejoinder.schemas.wire import WireError

_WHITESPACE = re.compile(r"[ \t\n\r]*")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UnusableError(f"has a duplicate key: {twice!r:.100}")
    return value


_SCAN, _ = _scanners(_unique)


def read_text(data: bytes | bytearray) -> str:
    """Read text.

    Raises:
        WireError: not UTF-8. Its message goes on from the name of what was read.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise WireError(f"is not UTF-8: {exc.reason} at byte {exc.start}") from exc


def read_value(data: bytes | bytearray) -> Any:
    """Read one JSON value.

    Raises:
        WireError: as `rejoinder.schemas.wire.read_object` does, but for the value's kind. Its message goes on from the
            name of what was read.
    """
    if data.startswith(BOM_UTF8):
        raise WireError("is not JSON: it begins with a byte order mark; write it without one")
    text = read_text(data)
    if too_deep(text):
        raise WireError(f"nests deeper than {MAX_NESTING} levels, or its brackets do not match: not usable JSON")
    start = _skip(text, 0)
    try:
        value, end = _SCAN(text, start)
    except UnusableError as exc:
        raise WireError(str(exc).removeprefix("the request ")) from exc  # which is what it mostly reads
    except json.JSONDecodeError as exc:
        raise WireError(f"is not JSON: {exc.msg} at character {exc.pos}") from exc
    except (StopIteration, IndexError) as exc:
        raise WireError(f"is not JSON: {_place(text, exc)}") from exc
    if _skip(text, end) != len(text):
        raise WireError(f"is not JSON: more follows its value at character {end}")
    return value


def _skip(text: str, at: int) -> int:
    return _WHITESPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty string


def _place(text: str, exc: StopIteration | IndexError) -> str:
    if not text.strip():
        return "it is empty"
    at = getattr(exc, "value", None)
    ended = not isinstance(at, int) or at >= len(text.rstrip())
    return "it ends too early" if ended else f"a value is missing or malformed at character {at}"
