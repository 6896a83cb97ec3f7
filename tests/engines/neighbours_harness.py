"""Sequences that run together on a batch, and what must be left of them."""

import asyncio
import threading
from contextlib import asynccontextmanager

from engine_harness import KINDS, eventually

from rejoinder.worker.engines.transformers.sampling import Sampling

PER_PAGE = 2 * 2 * 2 * 8 * 4 * 16  # both of K and V, layers, heads, size, bytes, tokens


def sampling(i):
    kind = KINDS[i % 5]
    return Sampling(kind["temperature"], kind.get("top_k", 0), kind.get("top_p", 1.0), seed=i)


def sequences(number, longest=40, new=30):
    """Prompts of different lengths and how they are to be continued, greedy and sampled."""
    return [
        ([3 + (7 * i + j) % 200 for j in range(1 + (i * 11) % longest)], 5 + (i * 7) % new, sampling(i))
        for i in range(number)
    ]


@asynccontextmanager
async def between_steps(batch):
    """The generation thread makes no step meanwhile."""
    manager, held, resume = batch._manager, threading.Event(), threading.Event()
    original = manager._generation_loop_body

    def body(*arguments, **named):
        held.set()
        resume.wait()
        return original(*arguments, **named)

    manager._generation_loop_body = body
    try:
        manager._wake_up_loop.set()
        await eventually(held.is_set)
        yield
    finally:
        manager._generation_loop_body = original
        resume.set()


async def together(batch, wanted, *, return_exceptions=False):
    """What comes of sequences that are all there before the first step.

    Else the threads' timing would say who is in which step, and so whom a step fails that fails by its number.
    """
    async with between_steps(batch):
        tasks = [asyncio.create_task(batch.run(*each)) for each in wanted]
        await asyncio.sleep(0)  # each is added before it waits for anything
    return await asyncio.gather(*tasks, return_exceptions=return_exceptions)


async def outcomes(batch, *wanted, poison=()):
    """Tokens, or the error."""
    results = await together(batch, (*wanted, *poison), return_exceptions=True)
    return [result if isinstance(result, Exception) else result.tokens for result in results]


async def nothing_left(engine):
    batch = engine._batch
    manager, processor = batch._manager, batch._manager.batch_processor
    await eventually(lambda: not processor.scheduler.has_pending_requests() and manager.cancel_queue.empty())
    async with between_steps(batch):  # the thread has done with the step that freed the last
        assert batch.alive
        assert not manager.output_router.result_handlers
        assert not processor.scheduler.waiting_requests_order
        assert not batch._stalls._sequences
        processor.cache.evict_cached_blocks()
        processor.cache.pool.try_to_free_sectors()
        assert processor.cache.pool.num_free_sectors == processor.cache.num_sectors
