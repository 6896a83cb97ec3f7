"""Streams of functions: which chunks come when, and what ends with a cancelled request."""

import asyncio

import pytest
from engine_harness import eventually
from function_apps import ask, in_process, request, serving

from rejoinder.worker.errors import BadRequest, Failed, NotGiven

KINDS = ["def", "async def"]


def endless(kind, pause):
    return f"""
        import asyncio, time
        seen = []
        @generate_stream
        {kind} stream(body, context):
            try:
                number = 0
                while True:
                    yield number
                    number += 1
                    {pause}
            finally:
                seen.append(["closed", context.cancelled])
        @generate("/seen")
        async def told(body): return seen
    """


PAUSES = {"def": "time.sleep(0.001)", "async def": "await asyncio.sleep(0.001)"}


@pytest.mark.parametrize("kind", KINDS)
async def test_chunks_come_in_order_while_it_runs(tmp_path, kind):
    source = f"""
        import asyncio, threading
        gate = threading.Event()
        @generate_stream
        {kind} stream(body):
            for number in range(100):
                yield number
            {"gate.wait(20)" if kind == "def" else "await asyncio.to_thread(gate.wait, 20)"}
            for number in range(100, body):
                yield number
        @generate("/open")
        async def opened(body): gate.set()
    """
    async with serving(tmp_path, source) as engine:
        chunks = []
        call = asyncio.create_task(ask(engine, 3000, emit=chunks.append))
        await eventually(lambda: len(chunks) == 100)
        assert not call.done()
        await ask(engine, path="/open")
        assert await call is None
        assert chunks == list(range(3000))


@pytest.mark.parametrize("kind", KINDS)
async def test_cancelling_closes_the_generator_and_nothing_is_emitted_any_more(tmp_path, kind):
    async with serving(tmp_path, endless(kind, PAUSES[kind])) as engine:
        chunks = []
        call = asyncio.create_task(ask(engine, emit=chunks.append))
        await eventually(lambda: len(chunks) > 3)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        count = len(chunks)

        async with asyncio.timeout(60):
            while await ask(engine, path="/seen") != [["closed", True]]:
                await asyncio.sleep(0.01)
        assert len(chunks) == count


@pytest.mark.parametrize("kind", KINDS)
async def test_cancelling_in_a_process_of_its_own(tmp_path, kind):
    async with in_process(tmp_path, endless(kind, PAUSES[kind]), cancel_seconds=60) as engine:
        chunks = []
        call = asyncio.create_task(ask(engine, emit=chunks.append))
        await eventually(lambda: len(chunks) > 3)
        call.cancel()
        await asyncio.wait({call})
        async with asyncio.timeout(60):
            while await ask(engine, path="/seen") != [["closed", True]]:
                await asyncio.sleep(0.01)
        assert engine.deaths == 0


async def test_many_streams_at_once_do_not_mix_and_are_bounded(tmp_path):
    source = """
        import threading, time
        running, most, four = [], [], threading.Barrier(4)
        @generate_stream
        def stream(body):
            four.wait(60)
            running.append(1)
            most.append(len(running))
            four.wait(60)
            for number in range(20):
                yield [body, number]
                time.sleep(0.001)
            running.pop()
        @generate("/most")
        async def told(body): return max(most)
    """
    async with serving(tmp_path, source, concurrency=4) as engine:
        seen = [[] for _ in range(12)]
        await asyncio.gather(*(ask(engine, n, emit=seen[n].append) for n in range(12)))
        assert seen == [[[n, at] for at in range(20)] for n in range(12)]
        assert await ask(engine, path="/most") == 4


async def test_what_may_stand_for_a_generator_and_what_may_not(tmp_path):
    source = """
        async def agen():
            yield 1
            yield 2
        @generate_stream("/list")
        def listed(body): return [1, 2]
        @generate_stream("/iterator")
        async def iterator(body): return agen()
        @generate_stream("/late")
        def late(body): return agen()
        @generate_stream("/lambda")
        def lambda_(body): return iterator(body)
        @generate_stream("/text")
        def text(body): return "12"
        @generate_stream("/none")
        async def none(body): return None
        @generate_stream("/typed")
        def typed(body: list[int]): yield from body
    """
    async with serving(tmp_path, source) as engine:
        for path in ("/list", "/iterator", "/late", "/lambda", "/typed"):
            chunks = []
            await ask(engine, [1, 2], path, emit=chunks.append)
            assert chunks == [1, 2]
        for path in ("/text", "/none"):
            with pytest.raises(Failed, match="TypeError"):
                await ask(engine, path=path, emit=print)
        with pytest.raises(BadRequest):
            await ask(engine, ["x"], "/typed", emit=print)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_chunk_that_nobody_takes_ends_the_stream(tmp_path, kind):
    async with serving(tmp_path, endless(kind, PAUSES[kind])) as engine:
        chunks = []

        def emit(chunk):
            chunks.append(chunk)
            if len(chunks) == 3:
                raise NotGiven("too much waits")

        with pytest.raises(NotGiven, match="too much waits"):
            await ask(engine, emit=emit)
        async with asyncio.timeout(60):
            while not await ask(engine, path="/seen"):
                await asyncio.sleep(0.01)
        assert chunks == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_chunk_that_is_not_json_ends_the_stream(tmp_path, kind):
    source = f"""
        @generate_stream
        {kind} stream(body):
            yield b"text"
            yield object()
            yield "never"
    """
    async with serving(tmp_path, source) as engine:
        chunks = []
        with pytest.raises(NotGiven):
            await ask(engine, emit=chunks.append)
        assert chunks == ["text"]


async def test_an_async_generator_that_never_waits_lets_others_run(tmp_path):
    source = """
        @generate_stream
        async def stream(body):
            for number in range(body): yield number
    """
    async with serving(tmp_path, source) as engine:
        chunks, between = [], []
        call = asyncio.create_task(engine.generate(request(1000, emit=chunks.append)))
        while not call.done():
            between.append(len(chunks))
            await asyncio.sleep(0)
        assert len(set(between)) > 900
