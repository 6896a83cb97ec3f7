"""JSON lines as bytes."""

import asyncio
import io
import os
from contextlib import aclosing

from hypothesis import given
from hypothesis import strategies as st

from rejoinder.client import lines as module
from rejoinder.client.lines import Line, lines_from, one_line, stream_lines


def numbered(data: bytes) -> list[Line]:
    return [line for line, _ in lines_from(io.BytesIO(data))]


def test_newlines_of_both_kinds_blank_lines_and_no_end() -> None:
    assert numbered(b'\xef\xbb\xbf{"a":1}\r\n\n  \r\n{"b":2}\n{"c":3}') == [
        Line(1, b'{"a":1}'),
        Line(4, b'{"b":2}'),
        Line(5, b'{"c":3}'),
    ]


def test_offsets_lead_back_to_the_line() -> None:
    data = b"one\r\n\ntwo\nthree"
    for line, offset in lines_from(io.BytesIO(data)):
        assert data[offset:].startswith(line.data)


@given(st.lists(st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"").replace(b"\r", b"")), max_size=20))
def test_a_stream_gives_what_the_file_gives(parts: list[bytes]) -> None:
    data = b"\n".join(parts)

    async def streamed() -> list[Line]:
        reader, writer = os.pipe()
        os.write(writer, data)
        os.close(writer)
        try:
            return [line async for some in stream_lines(reader) for line in some]
        finally:
            os.close(reader)

    assert asyncio.run(streamed()) == numbered(data)


async def test_a_stream_gives_what_is_there_without_waiting_for_more() -> None:
    reader, writer = os.pipe()
    async with asyncio.timeout(20), aclosing(stream_lines(reader)) as streamed:
        os.write(writer, b"one\ntwo\nthr")
        assert await anext(streamed) == [Line(1, b"one"), Line(2, b"two")]
        os.write(writer, b"ee\n")
        assert await anext(streamed) == [Line(3, b"three")]
        os.write(writer, b"four")
        os.close(writer)
        assert await anext(streamed) == [Line(4, b"four")]
        assert await anext(streamed, None) is None
    os.close(reader)


async def test_a_line_longer_than_any_chunk(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    path = tmp_path / "lines"
    path.write_bytes(b"x" * 1000 + b"\n" + b"y" * 6 + b"\nz")
    with path.open("rb") as file:
        got = [line async for some in stream_lines(file.fileno()) for line in some]
    assert got == [Line(1, b"x" * 1000), Line(2, b"y" * 6), Line(3, b"z")]


def test_one_line_changes_no_value() -> None:
    assert one_line(b'{"a": "b\\nc"}') == b'{"a": "b\\nc"}'
    assert one_line(b'{\r\n "a": 1.10\n}') == b'{   "a": 1.10 }'
