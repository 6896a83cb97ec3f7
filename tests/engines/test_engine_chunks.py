"""When a request's chunks are told, to the clock, and what ends the telling."""

import asyncio

import pytest
from engine_harness import chat, completion
from stream_harness import joined
from virtual_time import in_virtual_time

from rejoinder.worker.engines.answers import Choice
from rejoinder.worker.engines.chunks import INTERVAL, Chunks

TOLD = Choice("abcdef", "length", 6)


def said(chunks):
    """Of each chunk, the texts of its choices."""
    return [{part["index"]: part["text"] for part in chunk["choices"]} for chunk in chunks]


def test_the_first_text_goes_at_once_and_the_rest_gathers():
    async def main(loop):
        told = []
        chunks = Chunks(completion({}), lambda chunk: told.append((loop.time(), chunk)), "m", chat=False)
        for letter in "abc":
            chunks.text(0, letter)
        chunks.text(1, "A")
        chunks.text(1, "B")
        await asyncio.sleep(INTERVAL / 2)
        assert [at for at, _ in told] == [0, 0], "the first of each choice"
        await asyncio.sleep(10 * INTERVAL)
        assert [at for at, _ in told] == [0, 0, pytest.approx(INTERVAL)]
        chunks.text(0, "d")
        assert told[-1][0] == loop.time(), "nothing was told for a while"
        chunks.text(0, "e")
        chunks.finish(0, TOLD)
        chunks.finish(1, Choice("AB", "stop", 3))
        assert {at for at, _ in told[3:]} == {loop.time()}
        assert said(chunk for _, chunk in told) == [{0: "a"}, {1: "A"}, {0: "bc", 1: "B"}, {0: "d"}, {0: "ef"}, {1: ""}]
        await asyncio.sleep(10 * INTERVAL)
        assert len(told) == 6
        last = chunks.last(2, [TOLD, Choice("AB", "stop", 3)])
        assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 9, "total_tokens": 11}
        assert [one["text"] for one in joined([chunk for _, chunk in told], last)["choices"]] == ["abcdef", "AB"]
        chunks.close()

    in_virtual_time(main)


def test_nothing_is_told_once_it_is_closed():
    async def main(_):
        told = []
        chunks = Chunks(completion({}), told.append, "m", chat=False)
        for letter in "abc":
            chunks.text(0, letter)
        chunks.close()
        await asyncio.sleep(10 * INTERVAL)
        assert said(told) == [{0: "a"}]

    in_virtual_time(main)


def test_what_emitting_raises_in_a_timer_is_raised_to_who_tells_more():
    async def main(_):
        told = []

        def emit(chunk):
            told.append(chunk)
            if len(told) > 1:
                raise BufferError

        chunks = Chunks(completion({}), emit, "m", chat=False)
        chunks.text(0, "a")
        chunks.text(0, "b")
        await asyncio.sleep(10 * INTERVAL)
        for more in (lambda: chunks.text(0, "c"), lambda: chunks.text(1, "A"), lambda: chunks.finish(0, TOLD)):
            with pytest.raises(BufferError):
                more()
        await asyncio.sleep(10 * INTERVAL)
        assert said(told) == [{0: "a"}, {0: "b"}]
        chunks.close()

    in_virtual_time(main)


def test_half_a_character_is_no_chunk():
    async def main(_):
        told, texts = [], iter(["", "", "\u65e5", "", "!"])
        chunks = Chunks(chat({}), told.append, "m", chat=True)
        for _ in range(5):
            chunks.more(0, lambda: next(texts))
            await asyncio.sleep(2 * INTERVAL)
        deltas = [chunk["choices"][0]["delta"] for chunk in told]
        assert deltas == [{"role": "assistant", "content": "\u65e5"}, {"content": "!"}]
        chunks.close()

    in_virtual_time(main)
