"""SIGKILL at any instant loses nothing, and no request gets two different answers."""

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from worker_process import Queues, WorkerProcess

SLOW_WORKER = Path(__file__).parents[1] / "support" / "slow_worker.py"
REQUESTS = 500


def slow_worker(queues: Queues, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as stderr:
        return subprocess.Popen(
            [sys.executable, str(SLOW_WORKER), queues.requests, queues.responses, "0.03", "8"], stderr=stderr
        )


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
    for message in await drain(queues):
        response = json.loads(message.body)
        assert response["status_code"] == 200, response
        bodies[response["metadata"]["id"]].add(message.body)
        ids[response["metadata"]["id"]].add(message.attributes["response_id"])
        total += 1
    assert set(bodies) == set(range(count)), log.read_text()[-2000:]
    assert all(len(found) == 1 for found in bodies.values())
    assert all(len(found) == 1 for found in ids.values())
    return total - count


async def drain(queues: Queues) -> list:
    from rejoinder.adapters import open_subscription

    got: list = []
    async with open_subscription(queues.responses) as subscription:
        while messages := await subscription.receive(1000, 0):
            await subscription.ack(messages)
            got += messages
    return got


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_kills_at_random_points_lose_nothing(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    queues, log = Queues(tmp_path, "&lease=1"), tmp_path / "worker.log"
    await queues.send(*envelopes(REQUESTS))
    workers = [slow_worker(queues, log), slow_worker(queues, log)]
    try:
        for _ in range(6):
            await asyncio.sleep(chance.uniform(0.1, 1.2))  # the random point itself, not a wait for anything
            victim = chance.randrange(2)
            workers[victim].kill()
            workers[victim].wait(10)
            workers[victim] = slow_worker(queues, log)
        twice = await check_all_answered(queues, REQUESTS, log)
        # A kill between publish and ack answers again: seldom, and with the same bytes.
        assert twice <= 6 * 16
    finally:
        for worker in workers:
            worker.kill()
            worker.wait(10)


async def test_kills_in_the_thick_of_publishing_lose_nothing(tmp_path: Path) -> None:
    """With echo, all of a worker's time goes to receiving, publishing and acking: every kill falls in between."""
    chance = random.Random(4)
    count = 20_000
    queues, log = Queues(tmp_path, "&lease=1"), tmp_path / "worker.log"
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
    for message in await drain(queues):
        key = json.loads(message.body)["metadata"]["id"]
        assert seen.setdefault(key, message.body) == message.body
    assert set(seen) == set(range(count))


async def test_sigterm_hands_back_and_exits_0(tmp_path: Path) -> None:
    queues, log = Queues(tmp_path, "&lease=30"), tmp_path / "worker.log"
    await queues.send(*envelopes(100))
    first = slow_worker(queues, log)
    deadline = time.monotonic() + 30
    while not await queues.receive_some():
        assert time.monotonic() < deadline
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 0
    from rejoinder.adapters import open_subscription

    async with open_subscription(queues.requests) as subscription:
        backlog = await subscription.backlog()
        assert backlog.held == 0, "a stopped worker leaves nothing leased"
        assert 0 < backlog.waiting < 100
    second = slow_worker(queues, log)
    await queues.until_settled(30)
    second.send_signal(signal.SIGTERM)
    assert second.wait(30) == 0
