"""The keeper of leases: its calls beside each other and beside those that let messages go."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from group_queue import GroupQueue, opener
from virtual_time import virtually
from worker_harness import GateEngine, bench, until

from rejoinder.adapters import AdapterError, Denied, Message, Subscription
from rejoinder.worker import lease as lease_module
from rejoinder.worker.errors import Unavailable
from rejoinder.worker.lease import Lease, LeaseKeeper


class Slow(GroupQueue):
    """A queue on which renewals wait until the test lets them arrive."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.arrive = asyncio.Event()
        self.renewing = 0

    async def set_lease(self, messages: Sequence[Message], seconds: float) -> list[AdapterError | None]:
        if seconds == self.lease_seconds:
            self.renewing += 1
            await self.arrive.wait()
        return await super().set_lease(messages, seconds)


@pytest.mark.parametrize("max_attempts", [None, 1])
@virtually
async def test_a_renewal_under_way_does_not_hide_what_is_let_go(
    max_attempts: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Slow(lease_seconds=6.0, max_attempts=max_attempts)
    monkeypatch.setattr("rejoinder.worker.service.open_subscription", opener(queue))
    async with bench(GateEngine(), retry_delay_seconds=0.01) as it:
        it.engine.errors["a"] = [Unavailable("busy")]
        number = queue.send(None, b'{"path": "/run", "metadata": {}, "body": "a"}')
        await until(lambda: queue.renewing)
        it.engine.open = True
        it.engine.release("a")
        await until(lambda: not it.engine.running)
        for _ in range(20):
            await asyncio.sleep(0.005)  # what must not happen has this long to happen
        assert [event.what for event in queue.events] == ["received"]
        queue.arrive.set()
        await until(lambda: [event.what for event in queue.events][:2] == ["received", "let go"])
        assert queue.entries[number].due < time.monotonic() + queue.lease_seconds / 2
        await until(lambda: not queue.left)


@virtually
async def test_a_renewal_under_way_does_not_hide_what_a_stop_hands_back(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Slow(lease_seconds=6.0)
    monkeypatch.setattr("rejoinder.worker.service.open_subscription", opener(queue))
    async with bench(GateEngine(), grace_seconds=0.0) as it:
        number = queue.send(None, b'{"path": "/run", "metadata": {}, "body": "a"}')
        await until(lambda: queue.renewing)
        it.signals.receive("SIGTERM")
        await until(lambda: it.engine.cancelled)
        for _ in range(20):
            await asyncio.sleep(0.005)  # what must not happen has this long to happen
        assert [event.what for event in queue.events] == ["received"]
        queue.arrive.set()
        assert it.task is not None
        await asyncio.wait_for(it.task, 10)
        assert queue.entries[number].due <= time.monotonic()


class Counting:
    """A subscription that only renews; a call with a message whose body is `hangs` never returns."""

    max_hold_seconds = math.inf

    def __init__(self, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self.calls: list[int] = []
        self.renewed: set[str] = set()
        self.outcome: AdapterError | None = None

    async def set_lease(self, messages: Sequence[Message], seconds: float) -> list[AdapterError | None]:
        self.calls.append(len(messages))
        if any(message.body == b"hangs" for message in messages):
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        self.renewed |= {message.id for message in messages}
        return [self.outcome] * len(messages)


@asynccontextmanager
async def kept(
    subscription: Counting, bodies: Sequence[bytes]
) -> AsyncIterator[tuple[list[Lease], asyncio.Task[None]]]:
    keeper = LeaseKeeper(cast("Subscription", subscription), 1000.0)
    received = asyncio.get_running_loop().time() - subscription.lease_seconds / 3  # they are due
    messages = [Message(str(number), body, {}, 1, None, None) for number, body in enumerate(bodies)]
    leases = [keeper.hold(message, received, lambda: None) for message in messages]
    running = asyncio.create_task(keeper.run())
    try:
        yield leases, running
    finally:
        running.cancel()
        await asyncio.wait({running})
    assert not [task for task in asyncio.all_tasks() if "LeaseKeeper._renew" in repr(task)]


@virtually
async def test_a_hundred_thousand_leases_are_renewed_in_calls_of_a_bounded_size() -> None:
    subscription = Counting(300.0)
    async with kept(subscription, [b""] * 100_000) as (leases, _):
        ended = leases[0].ends
        await until(lambda: len(subscription.renewed) == 100_000)
        assert max(subscription.calls) <= lease_module.CHUNK
        assert leases[0].ends > ended
        assert sum(subscription.calls) == 100_000, "each once"


@virtually
async def test_a_call_that_hangs_keeps_back_no_other_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "CHUNK", 10)
    subscription = Counting(6.0)
    async with kept(subscription, [b"hangs"] + [b""] * 99) as (leases, _):
        await until(lambda: len(subscription.renewed) >= 90)
        assert leases[0].renewal is not None
        assert not leases[0].renewal.done()


@virtually
async def test_a_denied_renewal_ends_the_keeper() -> None:
    subscription = Counting(0.3)
    subscription.outcome = Denied("no")
    async with kept(subscription, [b""] * 3) as (_, running):
        with pytest.raises(Denied):
            await asyncio.wait_for(running, 20)


@virtually
async def test_a_released_lease_is_not_renewed_by_the_call_that_was_under_way() -> None:
    queue = Slow(lease_seconds=0.9)
    queue.send(None, b"")
    (message,) = await queue.receive(1, 0)
    keeper = LeaseKeeper(queue, 1000.0)
    lease = keeper.hold(message, asyncio.get_running_loop().time(), lambda: None)
    running = asyncio.create_task(keeper.run())
    await until(lambda: queue.renewing)
    keeper.release(lease)
    waiting = asyncio.create_task(keeper.quiet([lease]))
    await asyncio.sleep(0)
    assert not waiting.done()
    queue.arrive.set()
    await waiting
    assert lease.renewal is None
    before = queue.renewing
    loop = asyncio.get_running_loop()
    later = loop.time() + queue.lease_seconds
    await until(lambda: loop.time() > later)
    assert queue.renewing == before
    running.cancel()
    await asyncio.wait({running})
