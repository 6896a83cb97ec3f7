"""SIGTERM on each broker: nothing stays leased, and the end comes soon, even while the broker is away."""

import asyncio
from pathlib import Path

from answers import check_answers, envelopes, number
from broker_pairs import Pair, on
from outages import FAULTS, proxied
from pairs import QUIET
from worker_process import SlowWorker

REQUESTS = 100
LEASE = 120.0
"""Longer than the tests: what stayed leased would not come back in time."""


@on("sqs", "pubsub", "fifo")
async def test_a_stopped_worker_leaves_nothing_leased(pair: Pair, tmp_path: Path) -> None:
    queues, log = await pair.queues(lease=LEASE), tmp_path / "worker.log"
    bodies = envelopes(REQUESTS)
    for tenth in range(10):
        await queues.send(*bodies[tenth::10], key=f"group-{tenth}")
    with SlowWorker(queues, log, 1.0) as worker:  # many seconds for all: it is stopped in their midst
        got = await queues.receive(10)
        assert worker.stop(60) == 0, log.read_text()
    got += await queues.receive_some(QUIET)
    answered = {number(message) for message in got}
    check_answers(got, answered)
    assert 0 < len(answered) < REQUESTS
    with SlowWorker(queues, log, 0) as second:
        got += await queues.receive(REQUESTS - len(answered), LEASE / 2)
        assert second.stop() == 0, log.read_text()
    check_answers(got, range(REQUESTS))


@on("sqs", "pubsub")
async def test_a_worker_stops_while_its_broker_is_away(pair: Pair, tmp_path: Path) -> None:
    await asyncio.gather(*(stopped_while(pair, fault, tmp_path / f"{fault}.log") for fault in ("cut", "hang")))


async def stopped_while(pair: Pair, fault: str, log: Path) -> None:
    queues = await pair.queues()
    await queues.send(*envelopes(REQUESTS))
    with proxied(pair) as (proxy, env), SlowWorker(queues, log, 0.2, env=env, grace_seconds=2) as worker:
        got = await queues.receive(10)
        FAULTS[fault](proxy)
        assert await asyncio.to_thread(worker.stop, 60) == 0, log.read_text()
    with SlowWorker(queues, log, 0) as second:
        await queues.receive(REQUESTS, got=got)
        assert await asyncio.to_thread(second.stop) == 0, log.read_text()
    check_answers(got, range(REQUESTS))
