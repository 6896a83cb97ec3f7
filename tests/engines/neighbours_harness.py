"""Sequences that run together on a batch, and what must be left of them."""

import asyncio

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


async def outcomes(batch, *wanted, poison=()):
    """Tokens, or the error."""
    results = await asyncio.gather(*[batch.run(*each) for each in (*wanted, *poison)], return_exceptions=True)
    return [result if isinstance(result, Exception) else result.tokens for result in results]


async def nothing_left(engine):
    batch = engine._batch
    manager, processor = batch._manager, batch._manager.batch_processor
    await eventually(lambda: not processor.scheduler.has_pending_requests() and manager.cancel_queue.empty())
    assert batch.alive
    assert not manager.output_router.result_handlers
    assert not processor.scheduler.waiting_requests_order
    assert not batch._stalls._sequences
    processor.cache.evict_cached_blocks()
    processor.cache.pool.try_to_free_sectors()
    assert processor.cache.pool.num_free_sectors == processor.cache.num_sectors
