"""The batcher: while one batch is under way the next gathers."""

import asyncio
from collections.abc import Sequence

from virtual_time import virtually

from rejoinder.adapters import Denied
from rejoinder.worker.batcher import Batcher


@virtually
async def test_while_one_batch_is_under_way_the_next_gathers() -> None:
    batches: list[list[int]] = []
    gate = asyncio.Event()

    async def flush(batch: Sequence[int]) -> list[int]:
        batches.append(list(batch))
        await gate.wait()
        return [item * 10 for item in batch]

    batcher: Batcher[int, int] = Batcher(flush, max_items=4, concurrency=1)
    tasks = [asyncio.create_task(batcher.submit(n)) for n in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    tasks += [asyncio.create_task(batcher.submit(n)) for n in range(3, 10)]
    await asyncio.sleep(0)
    gate.set()
    assert await asyncio.gather(*tasks) == [n * 10 for n in range(10)]
    assert batches == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]]


@virtually
async def test_a_full_batch_waits_for_no_other_and_a_part_of_one_does() -> None:
    batches: list[list[int]] = []
    gates: list[asyncio.Event] = []

    async def flush(batch: Sequence[int]) -> list[int]:
        batches.append(list(batch))
        gates.append(asyncio.Event())
        await gates[-1].wait()
        return list(batch)

    batcher: Batcher[int, int] = Batcher(flush, max_items=3, concurrency=1, full=3)
    tasks: list[asyncio.Task[int]] = []

    async def submitted(*numbers: int) -> list[list[int]]:
        tasks.extend(asyncio.create_task(batcher.submit(n)) for n in numbers)
        for _ in range(5):
            await asyncio.sleep(0)
        return batches

    assert await submitted(0) == [[0]]
    assert await submitted(1, 2) == [[0]]
    assert await submitted(3, 4) == [[0], [1, 2, 3]]
    assert await submitted(5, 6) == [[0], [1, 2, 3], [4, 5, 6]]
    assert await submitted(7, 8, 9, 10) == [[0], [1, 2, 3], [4, 5, 6]], "no more than three at once"
    gates[1].set()
    assert (await submitted())[3:] == [[7, 8, 9]]
    gates[2].set()
    gates[3].set()
    assert (await submitted())[4:] == [], "a part waits until it is alone"
    gates[0].set()
    assert (await submitted())[4:] == [[10]]
    gates[4].set()
    assert await asyncio.gather(*tasks) == [*range(11)]


@virtually
async def test_what_is_submitted_as_the_last_batch_ends_is_not_stranded() -> None:
    async def flush(batch: Sequence[int]) -> list[int]:
        return list(batch)

    batcher: Batcher[int, int] = Batcher(flush, concurrency=1)

    async def chain(turns: int) -> None:
        await batcher.submit(0)
        for _ in range(turns):  # the turn in which the drain's task is done and not yet forgotten is among these
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await batcher.submit(1)

    for turns in range(6):
        await chain(turns)


@virtually
async def test_an_aborted_batcher_cancels_what_has_no_outcome() -> None:
    started = asyncio.Event()

    async def flush(batch: Sequence[int]) -> list[int]:
        started.set()
        await asyncio.Event().wait()
        return list(batch)

    batcher: Batcher[int, int] = Batcher(flush, max_items=1, concurrency=1)
    tasks = [asyncio.create_task(batcher.submit(n)) for n in range(3)]
    await started.wait()
    await batcher.abort()
    await asyncio.wait(tasks, timeout=5)
    assert all(task.cancelled() for task in tasks)


@virtually
async def test_an_aborted_batcher_calls_no_more() -> None:
    batches: list[list[int]] = []

    async def flush(batch: Sequence[int]) -> list[int]:
        batches.append(list(batch))
        return list(batch)

    batcher: Batcher[int, int] = Batcher(flush)
    assert await batcher.submit(0) == 0
    await batcher.abort()
    late = asyncio.create_task(batcher.submit(1))  # as one whose pause between two tries ends just then
    _, waiting = await asyncio.wait({late}, timeout=0.1)
    assert waiting == {late}
    assert batches == [[0]]
    late.cancel()


@virtually
async def test_a_flush_that_raises_fails_its_own_batch_only() -> None:
    async def flush(batch: Sequence[int]) -> list[int]:
        if 1 in batch:
            raise Denied("no")
        return list(batch)

    batcher: Batcher[int, int] = Batcher(flush, max_items=1)
    results = await asyncio.gather(*(batcher.submit(n) for n in range(3)), return_exceptions=True)
    assert [results[0], results[2]] == [0, 2]
    assert isinstance(results[1], Denied)


@virtually
async def test_a_cancelled_submission_does_not_disturb_its_batch() -> None:
    gate = asyncio.Event()

    async def flush(batch: Sequence[int]) -> list[int]:
        await gate.wait()
        return list(batch)

    batcher: Batcher[int, int] = Batcher(flush)
    first, second = (asyncio.create_task(batcher.submit(n)) for n in range(2))
    await asyncio.sleep(0)
    first.cancel()
    gate.set()
    assert await second == 1
