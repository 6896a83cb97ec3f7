"""What the pipe between a worker and its engine process carries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rejoinder.worker.engines.frames import Decoder, FrameError, encode

TEXT = st.text(alphabet=st.characters(exclude_categories=()))  # surrogates too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)


@given(values=st.lists(JSON, max_size=5), cuts=st.lists(st.integers(0, 200), max_size=8))
def test_frames_survive_any_cutting(values, cuts):
    stream = b"".join(encode({"kind": "x", "value": value}) for value in values)
    decoder, seen, start = Decoder(), [], 0
    for cut in [*sorted(min(cut, len(stream)) for cut in cuts), len(stream)]:
        seen += decoder.feed(stream[start:cut])
        start = cut
    assert [frame["value"] for frame in seen] == values


@pytest.mark.parametrize("digits", [1, 19, 4300, 4301, 100_000])
@pytest.mark.parametrize("sign", [1, -1])
def test_integers_of_any_size_survive(digits, sign):
    value = {"kind": "x", "a": [sign * (10**digits - 1), {"b": 10 ** (digits - 1)}], "text": "1" * digits}
    assert list(Decoder().feed(encode(value))) == [value]


def test_what_is_not_json_is_refused():
    circular: list = []
    circular.append(circular)
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (object(), circular, deep, b"bytes"):
        with pytest.raises(FrameError):
            encode({"kind": "x", "value": value})


@pytest.mark.parametrize(
    "data",
    [b"\xff\xff\xff\xff", b"\0\0\0\x02[]", b"\0\0\0\x02{}", b"\0\0\0\x03\xff\xff\xff", b"\0\0\0\x01{", b"\0" * 4],
)
def test_what_is_no_frame_is_refused(data):
    with pytest.raises(FrameError):
        list(Decoder().feed(data))


@given(data=st.binary(max_size=64))
def test_noise_never_raises_anything_else(data):
    try:
        for frame in Decoder().feed(data):
            assert isinstance(frame["kind"], str)
    except FrameError:
        pass
