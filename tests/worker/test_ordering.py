"""Messages of one ordering key: answered and acked one at a time, in their order, whatever happens to them."""

import asyncio
import contextlib
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from group_queue import GroupQueue, opener
from virtual_time import virtually
from worker_harness import Bench, GateEngine, bench, flaky, until

from rejoinder.adapters import AdapterError, Message, Transient
from rejoinder.worker import consumer as consumer_module
from rejoinder.worker.engines.protocol import EngineRequest
from rejoinder.worker.errors import BadRequest, Failed, Unavailable
from rejoinder.worker.service import StopSignals


def envelope(body: Any, number: int = 0, **fields: Any) -> bytes:
    return json.dumps({"path": "/run", "metadata": {"n": number}, "body": body, **fields}).encode()


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> GroupQueue:
    """What the worker of `bench` receives from."""
    groups = GroupQueue()
    monkeypatch.setattr("rejoinder.worker.service.open_subscription", opener(groups))
    return groups


def acked(queue: GroupQueue) -> list[int]:
    return [event.number for event in queue.events if event.what == "acked"]


@virtually
async def test_a_later_one_starts_when_the_earlier_is_acked(queue: GroupQueue) -> None:
    async with bench(GateEngine(capacity=8)) as it:
        for body in ("a1", "a2", "a3"):
            queue.send("a", envelope(body))
        queue.send("b", envelope("b1"))
        queue.send(None, envelope("free"))
        await until(lambda: len(it.engine.running) == 3)
        assert sorted(it.engine.started) == ["a1", "b1", "free"]
        it.engine.release("a1")
        await until(lambda: "a2" in it.engine.started)
        assert acked(queue) == [0]
        it.engine.open = True
        for body in ("a2", "b1", "free"):
            it.engine.release(body)
        responses = await it.responses_until(5)
        keys = [message.ordering_key for _, message in it.got]
        assert keys == [None] * 5, "the memory broker carries none"
        ran = [response["body"]["ran"] for response in responses]
        assert [body for body in ran if body.startswith("a")] == ["a1", "a2", "a3"]
        await until(lambda: not queue.left)


@virtually
async def test_one_key_does_not_take_the_room_of_others(queue: GroupQueue) -> None:
    queue.hold_back = False
    for number in range(200):
        queue.send("a", envelope(f"a{number}"))
    queue.send("b", envelope("b"))
    async with bench(GateEngine(capacity=2), prefetch=1) as it:
        await until(lambda: len(it.engine.running) == 2)
        assert it.engine.started == ["a0", "b"]


@virtually
async def test_what_waits_for_its_turn_is_bounded(queue: GroupQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumer_module, "MAX_BLOCKED", 20)
    queue.hold_back = False
    for number in range(200):
        queue.send("a", envelope(f"a{number}"))
    async with bench(GateEngine(capacity=2), prefetch=1) as it:
        await until(lambda: len(queue.events) >= 23)
        for _ in range(20):
            await asyncio.sleep(0.005)  # what must not happen has this long to happen
        assert len(queue.events) == 23
        it.engine.open = True
        it.engine.release("a0")
        await until(lambda: not queue.left)
        assert acked(queue) == list(range(200))


@virtually
async def test_leases_of_those_that_wait_for_their_turn_are_renewed(queue: GroupQueue) -> None:
    async with bench(GateEngine()) as it:
        for body in ("a1", "a2", "a3"):
            queue.send("a", envelope(body))
        await until(lambda: it.engine.running)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await until(lambda: loop.time() > began + 3 * queue.lease_seconds)
        it.engine.open = True
        it.engine.release("a1")
        await until(lambda: not queue.left)
        assert {event.attempt for event in queue.events} == {1}


@virtually
async def test_a_bad_request_waits_for_its_turn(queue: GroupQueue) -> None:
    async with bench(GateEngine()) as it:
        queue.send("a", envelope("a1"))
        queue.send("a", b"not json")
        queue.send("b", b"not json")
        await it.responses_until(1)
        assert it.got[0][1].attributes["request_message_id"] == "2"
        it.engine.release("a1")
        await it.responses_until(3)
        assert [response["status_code"] for response, _ in it.got] == [400, 200, 400]


@pytest.mark.parametrize("hold_back", [True, False])
@virtually
async def test_one_that_comes_back_takes_those_behind_it_along(queue: GroupQueue, hold_back: bool) -> None:
    queue.hold_back = hold_back
    async with bench(GateEngine(), retry_delay_seconds=0.3) as it:
        it.engine.errors["a1"] = [Unavailable("busy")]
        for body in ("a1", "a2", "a3"):
            queue.send("a", envelope(body))
        await until(lambda: len(queue.events) == 3)
        it.engine.open = True
        it.engine.release("a1")
        await until(lambda: not queue.left)
        assert [event.number for event in queue.events if event.what == "let go"] == [0, 1, 2]
        assert it.engine.started == ["a1", "a1", "a2", "a3"]
        assert acked(queue) == [0, 1, 2]


@virtually
async def test_what_comes_while_an_earlier_one_is_delayed_does_not_overtake_it(queue: GroupQueue) -> None:
    queue.hold_back = False  # as Pub/Sub, to which a delayed message is one that is being worked on
    async with bench(GateEngine(), retry_delay_seconds=1.0) as it:
        it.engine.open = True
        it.engine.errors["a1"] = [Unavailable("busy")]
        queue.send("a", envelope("a1"))
        await until(lambda: [event.what for event in queue.events] == ["received", "let go"])
        queue.send("a", envelope("a2"))
        queue.send("b", envelope("b1"))
        await until(lambda: not queue.left)
        assert it.engine.started == ["a1", "b1", "a1", "a2"]
        assert acked(queue) == [2, 0, 1]


@virtually
async def test_what_comes_with_the_stop_goes_back_behind_those_of_its_key(
    queue: GroupQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.hold_back = False
    receive, leave = queue.receive, asyncio.Event()

    async def slow(limit: int, wait: float) -> list[Message]:
        messages = await receive(limit, wait)
        if any(message.id == "2" for message in messages):
            with contextlib.suppress(asyncio.CancelledError):
                await leave.wait()
        return messages

    monkeypatch.setattr(queue, "receive", slow)
    async with bench(GateEngine(capacity=1), prefetch=9) as it:
        queue.send("a", envelope("a0"))
        queue.send("a", envelope("a1"))
        await until(lambda: it.engine.running and len(queue.events) == 2)
        for key in ("a", "b"):
            queue.send(key, envelope("late"))
        await until(lambda: len(queue.events) == 4)
        it.signals.receive("SIGTERM")
        await until(lambda: [e.number for e in queue.events if e.what == "let go"] == [3])
        it.engine.release("a0")
        assert it.task is not None
        await asyncio.wait_for(it.task, 10)
        assert [e.number for e in queue.events if e.what == "let go"] == [3, 1, 2]


@virtually
async def test_a_last_attempt_that_is_left_to_the_queue_lets_the_next_go_on(queue: GroupQueue) -> None:
    queue.max_attempts = 1
    async with bench(GateEngine()) as it:
        it.engine.open = True
        it.engine.errors["a1"] = [Failed("odd")]
        queue.send("a", envelope("a1"))
        queue.send("a", envelope("a2"))
        responses = await it.responses_until(2)
        assert [response["status_code"] for response in responses] == [500, 200]
        await until(lambda: not queue.left)
        assert [event.what for event in queue.events] == ["received", "received", "let go", "acked"]


@virtually
async def test_a_lost_lease_takes_those_behind_it_along(queue: GroupQueue) -> None:
    queue.hold_back = False
    async with bench(GateEngine(capacity=8)) as it:
        for body in ("a1", "a2", "a3"):
            queue.send("a", envelope(body))
        await until(lambda: it.engine.running and len(queue.events) == 3)
        queue.entries[0].attempt += 1  # another worker has it
        queue.entries[0].due = float("inf")
        await until(lambda: it.engine.cancelled == ["a1"])
        await until(lambda: [e.number for e in queue.events if e.what == "let go"] == [1, 2])
        assert "a2" not in it.engine.started[:1]
        assert await it.response_subscription.receive(1, 0) == []


@virtually
async def test_a_stop_hands_back_in_order_and_what_waits_for_a_running_one_after_it(queue: GroupQueue) -> None:
    queue.hold_back = False
    async with bench(GateEngine(capacity=1), prefetch=9) as it:
        for key in ("a", "b"):
            for number in range(3):
                queue.send(key, envelope(f"{key}{number}"))
        await until(lambda: it.engine.running and len(queue.events) == 6)
        queue.hold_back = True
        it.signals.receive("SIGTERM")
        await until(lambda: [e.number for e in queue.events if e.what == "let go"] == [3, 4, 5])
        it.engine.release("a0")
        assert it.task is not None
        await asyncio.wait_for(it.task, 10)
        assert [e.number for e in queue.events if e.what == "let go"] == [3, 4, 5, 1, 2]
        assert acked(queue) == [0]


@virtually
async def test_what_still_runs_after_the_grace_goes_back_before_those_behind_it(queue: GroupQueue) -> None:
    async with bench(GateEngine(capacity=4), grace_seconds=0.1) as it:
        for number in range(3):
            queue.send("a", envelope(f"a{number}"))
        await until(lambda: it.engine.running and len(queue.events) == 3)
        it.signals.receive("SIGTERM")
        assert it.task is not None
        await asyncio.wait_for(it.task, 10)
        assert [e.number for e in queue.events if e.what == "let go"] == [0, 1, 2]


@virtually
async def test_an_answer_that_cannot_be_published_by_the_end_goes_back_before_those_behind_it(
    queue: GroupQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_module, "LAST_SECONDS", 0.1)
    async with bench(start=False, grace_seconds=0.1) as it, flaky(it, monkeypatch) as (_, topic):
        monkeypatch.setattr("rejoinder.worker.service.open_subscription", opener(queue))
        topic.fail["publish"] = [Transient("away")]
        topic.hang.add("publish")
        for number in range(3):
            queue.send("a", envelope(f"a{number}"))
        it.engine.open = True
        it.start()
        await until(lambda: topic.under_way and len(queue.events) == 3)  # tried again, on its own
        it.signals.receive("SIGTERM")
        assert it.task is not None
        await asyncio.wait_for(it.task, 10)
        assert [e.number for e in queue.events if e.what == "let go"] == [0, 1, 2]


@virtually
async def test_a_second_signal_while_some_go_back_leaves_none_of_them_behind(
    queue: GroupQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.lease_seconds = 100.0
    set_lease, asked, gate = queue.set_lease, asyncio.Event(), asyncio.Event()

    async def slow(messages: Sequence[Message], seconds: float) -> list[AdapterError | None]:
        if messages[0].id == "1":
            asked.set()
            await gate.wait()
        return await set_lease(messages, seconds)

    monkeypatch.setattr(queue, "set_lease", slow)
    async with bench(GateEngine(capacity=1), prefetch=3, grace_seconds=1000.0) as it:
        for number in range(3):
            queue.send("a", envelope(f"a{number}"))
        queue.send(None, envelope("waits for the slot"))
        await until(lambda: it.engine.running and len(queue.events) == 4)
        it.signals.receive("SIGTERM")
        await until(lambda: [e.number for e in queue.events if e.what == "let go"] == [3])
        it.engine.release("a0")
        await asyncio.wait_for(asked.wait(), 10)
        it.signals.receive("SIGTERM")
        for _ in range(20):  # it hands back what is left
            await asyncio.sleep(0)
        gate.set()
        assert it.task is not None
        await asyncio.wait_for(it.task, 10)
        assert [e.number for e in queue.events if e.what == "let go"] == [3, 1, 2]


# ------------------------------------------------------------------------------------------------------ all at once


class Moody(GateEngine):
    """Ends each request after a while, sometimes with an error."""

    def __init__(self, chance: random.Random, capacity: int) -> None:
        super().__init__(capacity)
        self.chance = chance

    async def generate(self, request: EngineRequest) -> Any:
        for _ in range(self.chance.randrange(6)):
            await asyncio.sleep(self.chance.choice([0.0, 0.001]))
        match self.chance.randrange(12):
            case 0:
                raise Unavailable("busy")
            case 1:
                raise Failed("odd")
            case 2:
                raise BadRequest("never")
            case _:
                return request.body


def check(queue: GroupQueue) -> None:
    """The acks of each key are in the order of sending, and so nobody was acked while an earlier one was to come."""
    for key in {entry.key for entry in queue.entries if entry.key}:
        numbers = [event.number for event in queue.events if (event.what, event.key) == ("acked", key)]
        assert numbers == [entry.number for entry in queue.entries if entry.key == key]


async def disturb(queue: GroupQueue, it: Bench, chance: random.Random) -> None:
    """Lapse leases, fail acks, and stop the worker and start another, until everything is answered."""
    for _ in range(40):
        await asyncio.sleep(0.005)  # the pace of the mishaps
        open_ones = [entry.number for entry in queue.entries if not entry.gone and entry.attempt]
        if not open_ones:
            continue
        number = chance.choice(open_ones)
        match chance.randrange(8):
            case 0 | 1 | 2:
                for behind in queue.entries[number:]:
                    if behind.key == queue.entries[number].key and chance.random() < 0.7:
                        queue.lapse(behind.number)
            case 3 | 4:
                queue.ack_failures.append(number)
            case 5:
                await it.stop()
                it.signals = StopSignals()
                it.start()
            case _:
                queue.lapse(number)


@pytest.mark.parametrize("hold_back", [True, False])
@pytest.mark.parametrize("seed", range(12))
@virtually
async def test_nobody_is_overtaken(queue: GroupQueue, seed: int, hold_back: bool) -> None:
    chance = random.Random(seed)
    queue.hold_back = hold_back
    queue.counts = chance.random() < 0.7
    keys = [None, "a", "b", "c", "d"]
    for number in range(80):
        body = b"not json" if chance.random() < 0.05 else envelope(number, number)
        queue.send(chance.choice(keys), body)
    engine = Moody(chance, chance.choice([1, 3, 8]))
    async with bench(engine, grace_seconds=chance.choice([0.0, 0.02]), retry_delay_seconds=0.01) as it:
        await disturb(queue, it, chance)
        await until(lambda: not queue.left, 60)
        await it.stop()
        answered = await it.response_subscription.receive(10_000, 1)
    ids = [int(message.attributes["request_message_id"]) for message in answered]
    assert set(ids) == set(range(80)), "every one is answered"
    if hold_back:  # a broker that does not lets messages overtake by itself, when a lease ends before an earlier one
        check(queue)
        for key in keys[1:]:
            first = list(dict.fromkeys(number for number in ids if queue.entries[number].key == key))
            assert first == sorted(first), "so are the answers"
