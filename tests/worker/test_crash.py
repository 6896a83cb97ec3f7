"""SIGKILL at any instant loses nothing, and no request gets two different answers."""

import asyncio
import random
from pathlib import Path

import pytest
from answers import check_answers, envelopes
from pairs import sqlite
from worker_process import SlowWorker, WorkerProcess

from rejoinder.adapters import open_subscription

REQUESTS = 500


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_kills_at_random_points_lose_nothing(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    queues, log = sqlite(tmp_path, lease=1), tmp_path / "worker.log"
    await queues.send(*envelopes(REQUESTS))
    workers = [SlowWorker(queues, log), SlowWorker(queues, log)]
    try:
        for _ in range(6):
            await asyncio.sleep(chance.uniform(0.1, 1.2))  # the random point itself, not a wait for anything
            victim = chance.randrange(2)
            workers[victim].kill()
            workers[victim] = SlowWorker(queues, log)
        await queues.until_settled(120)
        twice = check_answers(await queues.receive_some(), range(REQUESTS))
        # A kill between publish and ack answers again: seldom, and with the same bytes.
        assert twice <= 6 * 16
    finally:
        for worker in workers:
            worker.kill()


async def test_kills_in_the_thick_of_publishing_lose_nothing(tmp_path: Path) -> None:
    """With echo, all of a worker's time goes to receiving, publishing and acking: every kill falls in between."""
    chance = random.Random(4)
    count = 20_000
    queues, log = sqlite(tmp_path, lease=1), tmp_path / "worker.log"
    await queues.send(*envelopes(count))
    for life in range(1, 5):
        with WorkerProcess(queues, log, "--max-attempts", "1000") as worker:
            worker.until_event("engine_ready", count=life)
            await asyncio.sleep(chance.uniform(0.01, 0.25))
            worker.kill()
    with WorkerProcess(queues, log, "--max-attempts", "1000") as worker:
        await queues.until_settled(240)
        assert worker.stop() == 0
    check_answers(await queues.receive_some(), range(count))


async def test_sigterm_hands_back_and_exits_0(tmp_path: Path) -> None:
    queues, log = sqlite(tmp_path, lease=30), tmp_path / "worker.log"
    await queues.send(*envelopes(100))
    first = SlowWorker(queues, log, 0.5)  # some seconds for all: it is stopped in their midst
    await queues.receive(1)
    assert first.stop() == 0
    async with open_subscription(queues.requests) as subscription:
        backlog = await subscription.backlog()
        assert backlog.held == 0, "a stopped worker leaves nothing leased"
        assert 0 < backlog.waiting < 100
    second = SlowWorker(queues, log)
    await queues.until_settled(120)
    assert second.stop() == 0
