"""Brokers that do not count deliveries, and brokers that do not let a message be held for ever."""

import asyncio
import json
from typing import Any

import pytest
from group_queue import GroupQueue, opener
from virtual_time import virtually
from worker_harness import GateEngine, bench, until

from rejoinder.adapters import Message
from rejoinder.worker.attempts import Attempts
from rejoinder.worker.engines.protocol import EngineRequest
from rejoinder.worker.errors import Failed, Unavailable
from rejoinder.worker.lease import LeaseKeeper


def delivery(message_id: str, attempt: int | None = None) -> Message:
    return Message(message_id, b"", {}, attempt, None, None)


def test_failures_are_counted_where_the_broker_does_not() -> None:
    attempts = Attempts()
    for expected in (1, 2, 3):
        assert attempts.of(delivery("a")) == expected
        attempts.failed(delivery("a"))
    assert attempts.of(delivery("b")) == 1
    attempts.answered(delivery("a"))
    assert attempts.of(delivery("a")) == 1


def test_each_delivery_is_taken_by_itself() -> None:
    attempts = Attempts()
    attempts.failed(delivery("a"))
    assert attempts.of(delivery("a", 7)) == 7
    attempts.failed(delivery("a", 7))
    assert attempts.of(delivery("a")) == 8
    assert attempts.of(delivery("a", 2)) == 2


def test_the_longest_ago_is_forgotten_first() -> None:
    attempts = Attempts(limit=2)
    for name in ("a", "b", "a", "c"):
        attempts.failed(delivery(name))
    assert [attempts.of(delivery(name)) for name in ("a", "b", "c")] == [3, 1, 2]


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> GroupQueue:
    groups = GroupQueue(counts=False, keeps_order=False)
    monkeypatch.setattr("rejoinder.worker.service.open_subscription", opener(groups))
    return groups


def envelope(body: Any) -> bytes:
    return json.dumps({"path": "/run", "metadata": {}, "body": body}).encode()


@virtually
async def test_what_always_fails_is_answered_in_the_end(queue: GroupQueue) -> None:
    class Asked(GateEngine):
        def __init__(self) -> None:
            super().__init__()
            self.attempts: list[int | None] = []

        async def generate(self, request: EngineRequest) -> Any:
            self.attempts.append(request.attempt)
            return await super().generate(request)

    async with bench(Asked(), max_attempts=3, retry_delay_seconds=0.01) as it:
        it.engine.open = True
        it.engine.errors["a"] = [Unavailable("busy"), Failed("odd"), Failed("odd again"), Failed("never seen")]
        queue.send(None, envelope("a"))
        (response,) = await it.responses_until(1)
        assert (response["status_code"], response["body"]["error"]["message"]) == (500, "odd again")
        assert "attempt" not in it.got[0][1].attributes, "a lower bound is no number"
        assert it.engine.attempts == [None] * 3
        await until(lambda: not queue.left)


@virtually
async def test_one_that_succeeds_after_all_is_answered_so(queue: GroupQueue) -> None:
    async with bench(max_attempts=3, retry_delay_seconds=0.01) as it:
        it.engine.open = True
        it.engine.errors["a"] = [Unavailable("busy"), Failed("odd")]
        queue.send(None, envelope("a"))
        (response,) = await it.responses_until(1)
        assert response["status_code"] == 200


# ------------------------------------------------------------------------------------------------------ hold limits


@virtually
async def test_work_past_the_brokers_limit_is_answered_before_it_passes(queue: GroupQueue) -> None:
    queue.counts = True
    queue.max_hold_seconds = 2.0
    async with bench(GateEngine(capacity=1)) as it:
        queue.send(None, envelope("runs"))
        queue.send(None, envelope("waits"))
        responses = await it.responses_until(2)
        assert [response["status_code"] for response in responses] == [504, 504]
        await until(lambda: not queue.left)
        assert {event.attempt for event in queue.events} == {1}, "acked in time"


@virtually
async def test_no_lease_is_renewed_past_the_brokers_limit(queue: GroupQueue) -> None:
    queue.max_hold_seconds = 0.5
    queue.lease_seconds = 0.3
    lost = asyncio.Event()
    queue.send(None, b"")
    (message,) = await queue.receive(1, 0)
    keeper = LeaseKeeper(queue, 1000.0)
    lease = keeper.hold(message, asyncio.get_running_loop().time(), lost.set)
    running = asyncio.create_task(keeper.run())
    # The queue would go on renewing it: it is the keeper that stops.
    await asyncio.wait_for(lost.wait(), 20)
    assert lease.ends <= lease.held_until
    running.cancel()
    await asyncio.wait({running})
