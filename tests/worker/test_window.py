"""The window between lines and their results: in order, bounded, and never waiting for what cannot come."""

import asyncio
import json
import tracemalloc

import pytest

from rejoinder.worker.line_run import weight
from rejoinder.worker.window import PIECE, Window


async def test_results_come_in_the_order_of_their_lines() -> None:
    window = Window(10, 1000)
    entries = [await window.enter(1) for _ in range(3)]
    for place in (2, 0, 1):
        window.finish(entries[place], b"%d" % place)
    window.end()
    assert [piece async for piece in window.pieces()] == [b"012"]


async def test_a_failure_while_a_piece_is_written_is_raised_though_the_line_ahead_has_no_result() -> None:
    window = Window(10, 10 * PIECE)
    done, _ahead = await window.enter(1), await window.enter(1)
    window.finish(done, b"x" * PIECE)
    pieces = window.pieces()
    assert await anext(pieces) == b"x" * PIECE
    window.end(ValueError("the line ahead"))
    with pytest.raises(ValueError, match="the line ahead"):
        await asyncio.wait_for(anext(pieces), 20)


@pytest.mark.parametrize(
    "line",
    [b"{},", b"[],", b"[0],", b'{"a":0},', b'{"a":[]},', b"1.5,", b"1000,", b'"xx",', b'"\\u00e9\\ud83d\\ude00",']
    + ['"\u00e9\U0001f600",'.encode(), b'{"a":0,"b":0,"c":0,"d":0,"e":0,"f":0},'],
)
def test_a_line_weighs_at_least_what_its_value_takes(line: bytes) -> None:
    text = b"[" + (line * 20_000)[:-1] + b"]"
    tracemalloc.start()
    try:
        value = json.loads(text)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(value) == 20_000
    assert taken <= weight(text)


def test_a_line_of_text_weighs_little_more_than_its_bytes() -> None:
    line = b'{"prompt": "' + b"some words of a prompt, as they are; " * 100 + b'"}'
    assert weight(line) < 4 * len(line)
