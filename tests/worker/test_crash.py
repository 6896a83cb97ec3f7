"""SIGKILL at any instant loses nothing, and no request gets two different answers."""

import asyncio
import json
import random
from collections import defaultdict
from pathlib import Path

import pytest
from pairs import Queues, sqlite
from worker_process import SlowWorker, WorkerProcess

from rejoinder.adapters import open_subscription

REQUESTS = 500


def envelopes(count: int) -> list[bytes]:
    return [
        json.dumps({"path": "/echo", "metadata": {"id": n}, "body": {"prompt": f"p{n}"}}).encode() for n in range(count)
    ]


async def check_all_answered(queues: Queues, count: int, log: Path) -> int:
    """Everything is answered, nothing with two bodies; returns how many answers came twice."""
    await queues.until_settled(120)
    bodies: dict[int, set[bytes]] = defaultdict(set)
    ids: dict[int, set[str]] = defaultdict(set)
    total = 0
    for message in await queues.receive_some():
        response = json.loads(message.body)
        assert response["status_code"] == 200, response
        bodies[response["metadata"]["id"]].add(message.body)
        ids[response["metadata"]["id"]].add(message.attributes["response_id"])
        total += 1
    assert set(bodies) == set(range(count)), log.read_text()[-2000:]
    assert all(len(found) == 1 for found in bodies.values())
    assert all(len(found) == 1 for found in ids.values())
    return total - count


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
        twice = await check_all_answered(queues, REQUESTS, log)
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
    bodies = envelopes(count)
    for start in range(0, count, 1000):
        await queues.send(*bodies[start : start + 1000])
    for life in range(1, 5):
        with WorkerProcess(queues, log, "--max-attempts", "1000") as worker:
            worker.until_event("engine_ready", count=life)
            await asyncio.sleep(chance.uniform(0.01, 0.25))
            worker.kill()
    with WorkerProcess(queues, log, "--max-attempts", "1000") as worker:
        await queues.until_settled(60)
        assert worker.stop() == 0
    await check_echoed(queues, count)


async def check_echoed(queues: Queues, count: int) -> None:
    seen: dict[int, bytes] = {}
    for message in await queues.receive_some():
        key = json.loads(message.body)["metadata"]["id"]
        assert seen.setdefault(key, message.body) == message.body
    assert set(seen) == set(range(count))


async def test_sigterm_hands_back_and_exits_0(tmp_path: Path) -> None:
    queues, log = sqlite(tmp_path, lease=30), tmp_path / "worker.log"
    await queues.send(*envelopes(100))
    first = SlowWorker(queues, log)
    await queues.receive(1)
    assert first.stop() == 0
    async with open_subscription(queues.requests) as subscription:
        backlog = await subscription.backlog()
        assert backlog.held == 0, "a stopped worker leaves nothing leased"
        assert 0 < backlog.waiting < 100
    second = SlowWorker(queues, log)
    await queues.until_settled(30)
    assert second.stop() == 0
