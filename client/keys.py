"""When two metadata are the same: the key by which a response finds its request.

Two JSON values are the same when a program that reads and writes JSON faithfully could have made one of the other:

- objects: the same keys with the same values, in any order (some brokers' consumers and Go programs sort them);
- strings: the same characters, however they were escaped;
- integers: the same number, of any size; `1`, `1.0` and `true` are three different values;
- other numbers: the same double, so that `1.10` is `1.1` and `1e2` is `100.0`.
"""

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


class Malformed(ValueError):
    """A line that is not a request or not a response, or whose metadata lacks what is to join by."""


class _LongInt(str):
    """The text of an integer that CPython does not convert, since that takes quadratic time."""

    __slots__ = ()


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_LONG_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_int=lambda text: int(text) if len(text) <= 4300 else _LongInt(text)
)


def read_json(data: bytes) -> Any:
    """Read one JSON value; an integer of more than 4300 digits becomes what only `canonical` understands.

    Raises:
        ValueError: not UTF-8 or not JSON.
    """
    text = data.decode()
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as exc:
        raise ValueError("it nests too deeply") from exc
    except ValueError:
        return _LONG_DECODER.decode(text)


def canonical(value: Any) -> str:
    """A text that is the same for the same JSON values, as this module defines it, and for no others."""
    try:
        return _ENCODER.encode(value) if not _has_long(value) else _slowly(value)
    except RecursionError as exc:
        raise ValueError("it nests too deeply") from exc


def _has_long(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_long, value.values()))
    if isinstance(value, list):
        return any(map(_has_long, value))
    return isinstance(value, _LongInt)


def _slowly(value: Any) -> str:
    if isinstance(value, _LongInt):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{_ENCODER.encode(key)}:{_slowly(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_slowly, value)) + "]"
    return _ENCODER.encode(value)


def key_of(metadata: Any, on: Sequence[str] = ()) -> bytes:
    """16 bytes that stand for the whole metadata, or for its values at the paths `on`.

    Args:
        metadata: A JSON value.
        on: Paths into it: a key, or keys with dots between.

    Raises:
        Malformed: it has no value at one of `on`.
        ValueError: it nests too deeply.
    """
    chosen = [_at(metadata, path) for path in on] if on else metadata
    # 128 bits: among a billion requests the chance that any two share a key by accident is 1e-21.
    return blake2b(canonical(chosen).encode(), digest_size=16).digest()


def _at(metadata: Any, path: str) -> Any:
    if isinstance(metadata, dict) and path in metadata:  # a key may hold a dot itself
        return metadata[path]
    value = metadata
    for step in path.split("."):
        if not isinstance(value, dict) or step not in value:
            raise Malformed(f"metadata has no {path!r}")
        value = value[step]
    return value
