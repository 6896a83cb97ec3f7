"""Time limits of many calls at once."""

import asyncio
import math

import pytest
from virtual_time import virtually

from rejoinder.worker.limits import Limits


@virtually
async def test_each_limit_ends_its_own_block_at_its_time() -> None:
    limits, clock = Limits(), asyncio.get_running_loop().time
    ended: list[str] = []

    async def run(name: str, seconds: float) -> None:
        began = clock()
        try:
            with limits.at(began + seconds):
                await asyncio.Event().wait()
        except TimeoutError:
            assert clock() >= began + seconds - 0.001
            ended.append(name)

    async with asyncio.timeout(20):
        await asyncio.gather(run("late", 0.3), run("early", 0.1), run("middle", 0.2))
    assert ended == ["early", "middle", "late"]


@virtually
async def test_a_limit_that_is_moved_ends_its_block_then() -> None:
    limits, clock = Limits(), asyncio.get_running_loop().time

    async def moved(first: float, then: float, until: float) -> bool:
        began = clock()
        with limits.at(began + first) as limit:
            limit.reschedule(began + then)
            await asyncio.sleep(until)
        return limit.expired

    async with asyncio.timeout(20):
        with pytest.raises(TimeoutError):
            await moved(1000.0, 0.05, math.inf)
        assert not await moved(0.05, 1000.0, 0.2)


@virtually
async def test_a_block_that_ends_in_time_or_is_cancelled_by_others_is_none_of_the_limits_business() -> None:
    limits, clock = Limits(), asyncio.get_running_loop().time
    with limits.at(clock() + 1000.0) as limit:
        await asyncio.sleep(0)
    assert not limit.expired
    with pytest.raises(KeyError), limits.at(clock() + 1000.0):
        raise KeyError

    async def waits() -> None:
        with limits.at(clock() + 1000.0):
            await asyncio.Event().wait()

    task = asyncio.create_task(waits())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=20)
    assert task.cancelled()
