"""The transformers engine under pressure: a full cache, cancelled and stopped sequences, greedy neighbours, its end."""

import asyncio
import threading
from itertools import count

import pytest
from engine_harness import GREEDY, KINDS, completion, eventually, started, tokens_of

from rejoinder.worker.engines.transformers.sampling import Sampling
from rejoinder.worker.errors import BadRequest, RequestTooLarge, Unavailable

pytestmark = pytest.mark.asyncio(loop_scope="module")

PER_PAGE = 2 * 2 * 2 * 8 * 4 * 16  # both of K and V, layers, heads, size, bytes, tokens


async def test_results_do_not_depend_on_preemption(engine, tiny):
    requests = [completion({"prompt": "lazy dog " * 6, "max_tokens": 100, **KINDS[i % 5]}, f"p-{i}") for i in range(8)]
    want = await asyncio.gather(*map(engine.generate, requests))
    small = await started(tiny, cache_bytes=12 * PER_PAGE, max_model_len=160)
    try:
        offloading = small._batch._manager.batch_processor.offloading_manager
        preempted = count()
        original = offloading.offload_requests

        def counted(*args, **kwargs):
            next(preempted)
            return original(*args, **kwargs)

        offloading.offload_requests = counted
        assert await asyncio.gather(*map(small.generate, requests)) == want
        assert next(preempted) > 0
    finally:
        await small.stop()


def at_preemption(engine, happened, resume):
    """Set `happened` when a sequence is put back for want of cache; the generation thread goes on with `resume`."""
    processor, loop = engine._batch._manager.batch_processor, asyncio.get_running_loop()
    original = processor.offloading_manager.offload_requests

    def offload():
        done = original()
        if processor.scheduler.block_new_requests:
            loop.call_soon_threadsafe(happened.set)
            resume.wait()
        return done

    processor.offloading_manager.offload_requests = offload


@pytest.mark.parametrize("how", ["cancelled", "stopped"])
async def test_a_sequence_ended_from_outside_lets_the_preempted_ones_in(tiny, how):
    small = await started(tiny, cache_bytes=10 * PER_PAGE, max_running=6)
    happened, resume = asyncio.Event(), threading.Event()
    at_preemption(small, happened, resume)
    # The cache is full when both have about 80 tokens.
    stop = None if how == "cancelled" else lambda tokens: len(tokens) >= 70
    both = [asyncio.create_task(tokens_of(small._batch, [5 + i] * 40, 110, Sampling(), stop)) for i in range(2)]
    try:
        async with asyncio.timeout(60):
            await happened.wait()
            (active,) = small._batch._manager.batch_processor.scheduler.active_requests.values()
            newcomer = asyncio.create_task(tokens_of(small._batch, [7], 1, Sampling()))
            if how == "cancelled":
                both.pop(active.initial_tokens[0] - 5).cancel()
            await asyncio.sleep(0)  # the cancelled one takes itself out of the batch
            resume.set()
            lengths = [len(tokens) for tokens in await asyncio.gather(newcomer, *both)]
        assert lengths == ([1, 110] if how == "cancelled" else [1, 70, 70])
    finally:
        resume.set()
        for task in both:
            task.cancel()
        await small.stop()


async def test_nothing_is_kept_of_what_was_stopped(engine):
    text = (await engine.generate(completion(GREEDY)))["choices"][0]["text"]
    stopping = {**GREEDY, "max_tokens": 100, "stop": text[5:8]}
    await asyncio.gather(*[engine.generate(completion(stopping, f"s{i}")) for i in range(200)])
    manager = engine._batch._manager
    await eventually(lambda: not manager.batch_processor.scheduler.has_pending_requests())
    assert manager.output_router.output_queue.qsize() == 0
    assert not manager.output_router.result_handlers


async def test_many_choices_leave_room_for_a_neighbour(engine):
    active = engine._batch._manager.batch_processor.scheduler.active_requests
    many = asyncio.create_task(engine.generate(completion({"prompt": "x", "n": 128, "max_tokens": 100}, "many")))
    await eventually(lambda: active)
    one = await engine.generate(completion({"prompt": "fox", "max_tokens": 1}))
    assert one["usage"]["completion_tokens"] == 1
    assert not many.done()
    assert len(active) <= 2, "a quarter of the places"
    assert len((await many)["choices"]) == 128


async def test_a_prompt_larger_than_the_cache_is_refused(tiny):
    small = await started(tiny, cache_bytes=3 * PER_PAGE)
    try:
        neighbour = asyncio.create_task(small.generate(completion({**GREEDY, "max_tokens": 20})))
        for body, kind in (
            ({"prompt": [5] * 48}, RequestTooLarge),
            ({"prompt": [5] * 40, "max_tokens": 9}, BadRequest),
        ):
            with pytest.raises(kind):
                await small.generate(completion(body))
        full = await small.generate(completion({"prompt": [5] * 40, "max_tokens": 8, "temperature": 0}))
        assert full["usage"]["total_tokens"] == 48
        assert (await neighbour)["usage"]["completion_tokens"] == 20
    finally:
        await small.stop()


async def test_cancelling_frees_everything(engine):
    manager, free = engine._batch._manager, engine._slots._value
    tasks = [asyncio.create_task(engine.generate(completion({**GREEDY, "max_tokens": 200, "n": 3}))) for _ in range(6)]
    await eventually(lambda: len(manager.batch_processor.scheduler.active_requests) >= 8)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    assert not manager.output_router.result_handlers
    await eventually(lambda: not manager.batch_processor.scheduler.has_pending_requests())
    assert engine._slots._value == free
    assert (await engine.generate(completion(GREEDY)))["usage"]["completion_tokens"] == 24


async def test_the_death_of_the_generation_thread_is_everybodys(tiny):
    """A device that is lost ends its thread; the engine says so and takes no more."""
    dying = await started(tiny)

    def lost(_model, _args, kwargs):
        if 288 in kwargs["input_ids"]:
            raise RuntimeError("CUDA error: device-side assert triggered")

    dying._batch._manager.model.register_forward_pre_hook(lost, with_kwargs=True)
    try:
        neighbours = [asyncio.create_task(dying.generate(completion({**GREEDY, "max_tokens": 200}))) for _ in range(3)]
        manager = dying._batch._manager
        await eventually(lambda: len(manager.batch_processor.scheduler.active_requests) == 3)
        for call in (tokens_of(dying._batch, [288], 5, Sampling()), *neighbours):
            with pytest.raises(Unavailable):
                await call
        async with asyncio.timeout(60):
            await dying.wait_gone()
        assert dying.capacity == 0
        with pytest.raises(Unavailable):
            await dying.generate(completion(GREEDY))
    finally:
        await dying.stop()


async def test_added_while_the_thread_ends_it_is_told(tiny):
    """The thread fails what is in its queue once; what comes after that nobody looks at."""
    engine = await started(tiny)
    manager = engine._batch._manager
    original = manager.input_queue.put

    def late(*args, **kwargs):
        manager.stop(block=True, hard_stop=True)
        original(*args, **kwargs)

    manager.input_queue.put = late
    async with asyncio.timeout(60):
        with pytest.raises(Unavailable):
            await engine._batch.run([5] * 4, 5, Sampling())
    await engine.stop()


async def test_stopping_answers_what_runs(tiny):
    engine = await started(tiny)
    call = asyncio.create_task(engine.generate(completion({**GREEDY, "max_tokens": 200})))
    await eventually(lambda: engine._batch.steps > 2)
    await engine.stop()
    with pytest.raises(Unavailable):
        await call
    with pytest.raises(Unavailable):
        await engine.generate(completion(GREEDY))
    await engine.stop()
    assert not engine._batch._manager.is_running()
