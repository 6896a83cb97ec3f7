"""Every sequence gets on: those that do not are ended, and a small cache starves nobody."""

import asyncio

import pytest
from engine_harness import eventually, started
from neighbours_harness import PER_PAGE, nothing_left, outcomes, sampling

from rejoinder.worker.engines.transformers.sampling import Sampling
from rejoinder.worker.errors import Unavailable

pytestmark = pytest.mark.asyncio(loop_scope="module")

IGNORED = 287


async def test_a_sequence_that_the_scheduler_forgets_is_ended(tiny):
    engine = await started(tiny, stall_seconds=0.2)
    try:
        scheduler = engine._batch._manager.batch_processor.scheduler
        original = scheduler._process_candidates

        def ignoring(candidates, *args):
            return original([state for state in candidates if IGNORED not in state.initial_tokens], *args)

        scheduler._process_candidates = ignoring
        ignored = asyncio.create_task(engine._batch.run([IGNORED], 5, Sampling()))
        while not ignored.done():  # others pass it by
            await engine._batch.run([5] * 4, 100, Sampling())
        with pytest.raises(Unavailable, match="no progress") as caught:
            await ignored
        assert caught.value.code == "stalled"
        await nothing_left(engine)
        # One that was running.
        scheduler._process_candidates = lambda candidates, *args: original(
            [state for state in candidates if IGNORED - 1 not in state.initial_tokens or not state.generated_tokens],
            *args,
        )
        running = asyncio.create_task(engine._batch.run([IGNORED - 1] * 4, 200, Sampling()))
        other = asyncio.create_task(engine._batch.run([5] * 4, 200, Sampling()))
        while not running.done():
            await other
            other = asyncio.create_task(engine._batch.run([5] * 4, 200, Sampling()))
        await other
        with pytest.raises(Unavailable, match="no progress"):
            await running
        await nothing_left(engine)
    finally:
        await engine.stop()


async def test_waiting_ones_turn_is_no_stall(tiny):
    engine = await started(tiny, stall_seconds=0.1, max_running=1)
    try:
        results = await outcomes(engine._batch, *[([5 + i], 100, Sampling()) for i in range(4)])
        assert [len(tokens) for tokens in results] == [100] * 4
    finally:
        await engine.stop()


async def test_many_long_sequences_in_a_very_small_cache_all_end(tiny):
    engine = await started(tiny, cache_bytes=9 * PER_PAGE, max_running=8)
    try:
        longest = engine._batch.longest
        wanted = [([3 + i] * (1 + (i * 37) % (longest // 2)), longest // 2 - 1, sampling(i)) for i in range(12)]
        async with asyncio.timeout(250):
            results = await outcomes(engine._batch, *wanted)
        assert all(isinstance(tokens, list) for tokens in results)
        assert await outcomes(engine._batch, *wanted[::-1]) == results[::-1]
        await nothing_left(engine)
    finally:
        await engine.stop()


async def test_a_long_prompt_is_not_overtaken_for_ever(tiny):
    """Short ones come without end; transformers would let them in before it whenever it does not fit."""
    engine = await started(tiny, cache_bytes=10 * PER_PAGE, max_running=6)
    try:
        batch, ended = engine._batch, asyncio.Event()

        async def stream(i):
            while not ended.is_set():
                await batch.run([5 + i] * 10, 40, Sampling())

        streams = [asyncio.create_task(stream(i)) for i in range(6)]
        await eventually(lambda: batch.steps > 60)
        async with asyncio.timeout(120):
            long = await batch.run([IGNORED] * (batch.longest - 4), 4, Sampling())
        assert len(long.tokens) == 4
        ended.set()
        await asyncio.gather(*streams)
        await nothing_left(engine)
    finally:
        await engine.stop()
