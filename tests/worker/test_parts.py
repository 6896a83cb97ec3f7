"""The worker's parts, each alone."""

import asyncio
from collections.abc import Sequence

import pytest
import structlog
from virtual_time import virtually

from rejoinder.adapters import AdapterError, Denied, Transient, open_subscription, open_topic
from rejoinder.adapters.driver import Message, Outgoing
from rejoinder.adapters.memory import fresh_url
from rejoinder.worker.engines.echo import EchoEngine
from rejoinder.worker.handler import response_id
from rejoinder.worker.lease import LeaseKeeper
from rejoinder.worker.pace import Pace, Waits
from rejoinder.worker.retry import RetryPolicy, call_until, each_until, entry_until
from rejoinder.worker.slots import Slots

# ------------------------------------------------------------------------------------------------------ retry


def test_delays_grow_are_jittered_and_end_at_the_cap() -> None:
    policy = RetryPolicy(max_attempts=5, dead_letter_after=None, delay=1.0, delay_max=60.0)
    for attempt, ceiling in [(1, 1), (2, 2), (3, 4), (7, 60), (100_000, 60)]:
        delays = [policy.backoff(attempt) for _ in range(200)]
        assert ceiling / 2 <= min(delays)
        assert max(delays) <= ceiling
        assert len(set(delays)) > 100


@pytest.mark.parametrize(
    ("max_attempts", "dead_letter_after", "attempt", "action", "exhausted"),
    [
        (3, None, 1, "retry", False),
        (3, None, 2, "retry", False),
        (3, None, 3, "answer_and_ack", False),
        (3, None, 4, "answer_and_ack", False),
        (3, None, 6, "answer_and_ack", False),
        (3, None, 7, "answer_and_ack", True),
        (3, 5, 3, "answer_and_ack", False),
        (9, 5, 4, "retry", False),
        (9, 5, 5, "answer_and_leave", False),
        (5, 5, 5, "answer_and_leave", False),
        (5, 5, 10, "answer_and_leave", False),
        (5, 5, 11, "answer_and_ack", True),
    ],
)
def test_what_becomes_of_a_failed_delivery(
    max_attempts: int, dead_letter_after: int | None, attempt: int, action: str, exhausted: bool
) -> None:
    policy = RetryPolicy(max_attempts=max_attempts, dead_letter_after=dead_letter_after, delay=1, delay_max=1)
    assert policy.on_failure(attempt) == action
    assert policy.exhausted(attempt) is exhausted
    assert policy.exhausted(None) is False


@virtually
async def test_many_that_wait_for_one_broker_say_so_once_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    log = structlog.testing.CapturingLogger()
    monkeypatch.setattr("rejoinder.worker.retry.log", log)
    tries: dict[int, int] = {}

    async def publish(number: int) -> str | AdapterError:
        tries[number] = tries.get(number, 0) + 1
        return Transient("no route to it") if tries[number] < 3 else "done"

    tried = [entry_until("a call of this test", lambda n=n: publish(n)) for n in range(100)]
    assert await asyncio.gather(*tried) == ["done"] * 100
    (line,) = log.calls
    assert (line.args, line.kwargs["error"]) == (("broker_retry",), "no route to it")


@virtually
async def test_only_transient_entries_are_tried_again() -> None:
    calls: list[list[int]] = []

    async def call(items: Sequence[int]) -> list[str | AdapterError]:
        calls.append(list(items))
        if len(calls) == 1:
            return ["a", Transient("busy"), Denied("no")]
        if len(calls) == 2:
            raise Transient("away")
        return ["b"]

    a, b, c = await each_until("test", call, [1, 2, 3])
    assert (a, b) == ("a", "b")
    assert isinstance(c, Denied)
    assert calls == [[1, 2, 3], [2], [2]]


@virtually
async def test_an_entry_is_tried_again_by_itself() -> None:
    outcomes: list[str | AdapterError] = [Transient("busy"), Transient("busy"), "id"]

    async def submit() -> str | AdapterError:
        return outcomes.pop(0)

    assert await entry_until("test", submit) == "id"
    outcomes = [Transient("busy")] * 3
    assert isinstance(await entry_until("test", submit, limit=0.0), Transient)


@virtually
async def test_a_limit_ends_the_trying() -> None:
    async def call(items: Sequence[int]) -> list[str | AdapterError]:
        return [Transient("busy")] * len(items)

    (outcome,) = await each_until("test", call, [1], limit=0.0)
    assert isinstance(outcome, Transient)

    async def away() -> None:
        raise Transient("away")

    with pytest.raises(Transient):
        await call_until("test", away, limit=0.0)


@virtually
async def test_what_is_not_transient_is_raised_at_once() -> None:
    calls = 0

    async def denied() -> None:
        nonlocal calls
        calls += 1
        raise Denied("no")

    with pytest.raises(Denied):
        await call_until("test", denied)
    assert calls == 1


# ------------------------------------------------------------------------------------------------------ slots, pace


@virtually
async def test_slots_follow_the_capacity_and_are_given_in_order() -> None:
    engine = EchoEngine("/x")
    engine.capacity = 1
    slots = Slots(engine)
    order: list[int] = []
    leave = asyncio.Event()

    async def work(n: int) -> None:
        await slots.acquire()
        order.append(n)
        await leave.wait()
        slots.release()

    tasks = [asyncio.create_task(work(n)) for n in range(4)]
    await asyncio.sleep(0)
    assert order == [0]
    tasks[1].cancel()
    engine.capacity = 2
    slots.wake()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert order == [0, 2]
    leave.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 2, 3]
    assert slots.used == 0


@virtually
async def test_a_slot_handed_to_a_cancelled_waiter_is_not_lost() -> None:
    engine = EchoEngine("/x")
    engine.capacity = 0
    slots = Slots(engine)

    async def work() -> None:
        await slots.acquire()
        raise AssertionError("cancelled before")

    waiter = asyncio.create_task(work())
    await asyncio.sleep(0)
    engine.capacity = 1
    slots.wake()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert slots.used == 0


def test_the_prefetch_is_what_completes_in_one_receive() -> None:
    pace = Pace()
    assert pace.completed_in_one_receive() == 1.0
    now = 0.0
    for _ in range(200):
        now += 0.010
        pace.completed(now)
        pace.received(0.100)
    assert pace.completed_in_one_receive() == pytest.approx(20, rel=0.05)


def test_a_batch_that_completes_at_once_does_not_look_like_a_rate() -> None:
    pace = Pace()
    assert pace.steadily_in_one_receive(0.0) == 0.0
    for step in range(100):
        pace.received(0.100)
        for _ in range(32):
            pace.completed(float(step))
    assert pace.completed_in_one_receive() > 100
    assert pace.steadily_in_one_receive(99.5) == pytest.approx(6.4, rel=0.3)
    assert pace.steadily_in_one_receive(199.0) < 0.01, "that was long ago"


def test_the_engine_waits_while_it_has_nothing_and_something_is_there() -> None:
    waits = Waits(100.0)
    waits.started(103.0, since=102.5)
    assert waits.seconds == 0.5, "before that nothing was there"
    waits.started(104.0, since=101.0)
    waits.ended(105.0)
    assert waits.seconds == 0.5, "it had one to run"
    waits.ended(106.0)
    waits.started(110.0, since=104.0)
    assert waits.seconds == 4.5, "it had none since 106"


def test_a_response_id_is_stable_and_its_own() -> None:
    assert response_id("s", "m", "mine") == "mine"
    assert response_id("s", "m", None) == response_id("s", "m", None)
    assert len({response_id(s, m, None) for s in ("s", "t") for m in ("m", "n")}) == 4


# ------------------------------------------------------------------------------------------------------ lease


@virtually
async def test_the_keeper_renews_in_batches_and_lets_go_of_what_is_released() -> None:
    url = fresh_url()
    async with open_topic(url) as topic, open_subscription(url + "?lease=0.6") as subscription:
        await topic.publish([Outgoing(b"x")] * 50)
        messages = await subscription.receive(50, 1)
        calls: list[int] = []

        class Watched:
            lease_seconds = subscription.lease_seconds
            max_hold_seconds = subscription.max_hold_seconds

            async def set_lease(self, messages: Sequence, seconds: float) -> list:
                calls.append(len(messages))
                return await subscription.set_lease(messages, seconds)

        keeper = LeaseKeeper(Watched(), 1000.0)
        loop = asyncio.get_running_loop()
        leases = [keeper.hold(message, loop.time(), lambda: None) for message in messages]
        running = asyncio.create_task(keeper.run())
        deadline = loop.time() + 10
        while len(calls) < 4:
            assert loop.time() < deadline
            await asyncio.sleep(0.01)
        assert set(calls) == {50}
        keeper.release(leases[0])
        del calls[:]
        while not calls:
            assert loop.time() < deadline
            await asyncio.sleep(0.01)
        assert calls == [49]
        running.cancel()
        await asyncio.wait({running})


@pytest.mark.parametrize("turns", range(8))
@virtually
async def test_a_keeper_that_is_stopped_as_a_renewal_ends_does_stop(turns: int) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    class Slow:
        lease_seconds = 600.0
        max_hold_seconds = float("inf")

        async def set_lease(self, messages: Sequence, _seconds: float) -> list:
            asked.set()
            await answer.wait()
            return [None] * len(messages)

    keeper = LeaseKeeper(Slow(), 1000.0)
    now = asyncio.get_running_loop().time()
    for received in (now - 300.0, now):  # one is due, and the other says until when to wait
        keeper.hold(Message("m", b"", {}, 1, None, None), received, lambda: None)
    running = asyncio.create_task(keeper.run())
    await asyncio.wait_for(asked.wait(), 5)
    answer.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait({running}, timeout=5)
    assert running.cancelled()


@virtually
async def test_a_message_is_not_renewed_for_ever() -> None:
    url = fresh_url()
    async with open_topic(url) as topic, open_subscription(url + "?lease=0.3") as subscription:
        await topic.publish([Outgoing(b"x")])
        (message,) = await subscription.receive(1, 1)
        lost = asyncio.Event()
        loop = asyncio.get_running_loop()
        keeper = LeaseKeeper(subscription, max_hold=0.8)
        keeper.hold(message, loop.time(), lost.set)
        running = asyncio.create_task(keeper.run())
        async with asyncio.timeout(10):
            await lost.wait()
            (again,) = await subscription.receive(1, 5)
        assert again.attempt == 2
        running.cancel()
        await asyncio.wait({running})
