"""A stream whose sequence is put back, or whose step is made again, tells each character once."""

import asyncio
from itertools import count

import pytest
import torch
from engine_harness import KINDS, completion, started
from static_harness import MARK, at_once, marked
from stream_harness import joined, stream, streams

from rejoinder.worker.errors import Failed

pytestmark = pytest.mark.asyncio(loop_scope="module")

PER_PAGE = 2 * 2 * 2 * 8 * 4 * 16  # both of K and V, layers, heads, size, bytes, tokens


def requests(count=8, length=100):
    return [
        completion({"prompt": "lazy dog " * 6, "max_tokens": length, "stop": "zq", **KINDS[i % 5]}, f"p-{i}")
        for i in range(count)
    ]


async def plain(engine, some):
    return await asyncio.gather(*map(engine.generate, some))


async def test_sequences_that_are_put_back_go_on_where_they_were(engine, tiny):
    want = await plain(engine, requests())
    small = await started(tiny, cache_bytes=12 * PER_PAGE, max_model_len=160, served_names=[want[0]["model"]])
    try:
        offloading, preempted = small._batch._manager.batch_processor.offloading_manager, count()
        original = offloading.offload_requests

        def counted(*args, **kwargs):
            next(preempted)
            return original(*args, **kwargs)

        offloading.offload_requests = counted
        assert [joined(*told) for told in await streams(small, requests())] == want
        assert next(preempted) > 0
    finally:
        await small.stop()


async def test_a_step_that_is_made_again_is_told_once(engine, tiny):
    want = await plain(engine, requests())
    failing = await started(tiny, served_names=[want[0]["model"]])
    runner, steps, failed = failing._batch._manager.batch_processor.model_runner, count(), count()
    original = runner._sample

    def sample(scores, output_ids):
        original(scores, output_ids)
        if next(steps) % 10 == 9 and scores.shape[1] > 1:
            next(failed)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    runner._sample = sample
    try:
        assert [joined(*told) for told in await streams(failing, requests())] == want
        assert next(failed) > 3
    finally:
        await failing.stop()


@pytest.mark.parametrize("at", [1, 7])
async def test_a_static_batch_that_is_run_again_in_halves_is_told_once(static, at):
    good = requests(6, length=40)
    want = await plain(static, good)

    def fails(rows, step, output):
        if step == at:
            raise RuntimeError("an index is out of bounds")

    with marked(static, fails):
        guilty, *others = await at_once(
            static,
            stream(static, completion({"prompt": [MARK, 5, 6], "max_tokens": 20})),
            *[stream(static, request) for request in good],
        )
        with pytest.raises(Failed):
            await guilty
        assert [joined(*told) for told in await asyncio.gather(*others)] == want
