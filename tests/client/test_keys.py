"""When two metadata are the same."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rejoinder.client.keys import Malformed, canonical, key_of, read_json

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


def typed(value: Any) -> Any:
    """The value with what Python's equality leaves out: 1, 1.0 and True differ."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    return [typed(item) for item in value] if isinstance(value, list) else (type(value).__name__, repr(value))


@given(json_values, st.booleans())
def test_the_order_of_keys_and_the_spelling_of_strings_do_not_matter(value: Any, ascii_only: bool) -> None:
    written = json.dumps(shuffled(value), ensure_ascii=ascii_only, indent=1).encode()
    assert key_of(read_json(written)) == key_of(value)


@given(json_values, json_values)
def test_different_values_have_different_texts(one: Any, other: Any) -> None:
    assert (canonical(one) == canonical(other)) == (typed(one) == typed(other))


def test_numbers() -> None:
    def key(text: str) -> bytes:
        return key_of(read_json(text.encode()))

    assert len({key(text) for text in ("1", "1.0", "true", '"1"', "[1]", "null")}) == 6
    assert key("1.10") == key("1.1")
    assert key("1e2") == key("100.0")
    assert key("9007199254740993") != key("9007199254740992")
    long = "7" * 5000
    assert key(f'{{"b":{long},"a":1}}') == key(f'{{"a":1,"b":{long}}}')
    assert key(f'{{"b":{long}}}') != key(f'{{"b":{long}7}}')
    assert key(f'{{"b":{long}}}') != key(f'{{"b":"{long}"}}')


def test_chosen_keys() -> None:
    metadata = {"id": 1, "document": {"id": 2, "run": "x"}, "a.b": 3, "a": {"b": 4}}
    assert key_of(metadata, ["id"]) == key_of({"id": 1, "other": 5}, ["id"])
    assert key_of(metadata, ["document.id"]) == key_of({"document": {"id": 2}}, ["document.id"])
    assert key_of(metadata, ["document.id", "id"]) != key_of(metadata, ["id", "document.id"])
    assert key_of(metadata, ["a.b"]) == key_of({"a.b": 3}, ["a.b"]), "a key that holds a dot comes first"
    for absent in ("nothing", "id.x", "document.none"):
        with pytest.raises(Malformed, match=absent):
            key_of(metadata, [absent])
    with pytest.raises(Malformed):
        key_of(None, ["id"])


@pytest.mark.parametrize("data", [b"", b"nope", b"NaN", b'{"a":}', b"\xff", b"[" * 100_000, b"[" * 2000 + b"]" * 2000])
def test_what_is_not_json(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical(read_json(data))
