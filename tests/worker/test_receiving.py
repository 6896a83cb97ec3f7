"""Several receives at once, where one cannot bring all that there is room for."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from virtual_time import virtually
from worker_harness import GateEngine, bench, flaky, until, until_empty

from rejoinder.adapters import Denied, Message, Transient
from rejoinder.worker.engines.echo import EchoEngine


class Limited:
    """A subscription's `receive` that returns ten messages at most, and knows how many are under way."""

    def __init__(self, inner: Callable[[], Any], seconds: float = 0.01) -> None:
        self._inner = inner
        self._seconds = seconds
        self.under_way: list[int] = []
        self.most = 0
        self.most_asked = 0
        self.calls = 0
        self.away = False
        self.cancelled = 0

    async def __call__(self, limit: int, wait: float) -> list[Message]:
        assert limit <= 10
        self.calls += 1
        self.under_way.append(limit)
        self.most = max(self.most, len(self.under_way))
        self.most_asked = max(self.most_asked, sum(self.under_way))
        try:
            if self.away:
                raise Transient("away")
            messages: list[Message] = await self._inner().receive(limit, wait)
            await asyncio.sleep(self._seconds)  # a broker far away
            return messages
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.under_way.remove(limit)


def limited(part: Any, seconds: float = 0.01) -> Limited:
    part.max_receive = 10
    part.receive = Limited(lambda: part.inner, seconds)
    return part.receive  # type: ignore[no-any-return]


@virtually
async def test_receives_go_together_while_they_come_back_full(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        bench(GateEngine(capacity=100), start=False, prefetch=0) as it,
        flaky(it, monkeypatch) as (subscription, _),
    ):
        receive = limited(subscription)
        for number in range(300):
            await it.send(number)
        it.start()
        await until(lambda: len(it.engine.running) == 100)
        assert receive.most > 4
        assert receive.most_asked <= 100
        assert not receive.under_way, "there is no room"
        it.engine.open = True
        for body in list(it.engine.started):
            it.engine.release(body)
        await it.responses_until(300)
        await until_empty(it)


@virtually
async def test_an_idle_queue_is_asked_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rejoinder.worker.receiver.RECEIVE_WAIT", 0.1)
    async with (
        bench(GateEngine(capacity=100), start=False) as it,
        flaky(it, monkeypatch) as (subscription, _),
    ):
        it.engine.open = True
        receive = limited(subscription)
        for number in range(300):
            await it.send(number)
        it.start()
        await it.responses_until(300)
        assert receive.most > 4
        await until(lambda: len(receive.under_way) == 1)
        receive.most, calls = 0, receive.calls
        await until(lambda: receive.calls >= calls + 5)
        assert receive.most == 1


@virtually
async def test_few_messages_are_asked_for_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for less than two whole receives is one receive's."""
    async with (
        bench(GateEngine(capacity=12), start=False, prefetch=0) as it,
        flaky(it, monkeypatch) as (subscription, _),
    ):
        it.engine.open = True
        receive = limited(subscription, 0.001)
        for number in range(200):
            await it.send(number)
        it.start()
        await it.responses_until(200)
        assert receive.most == 1


@virtually
async def test_a_stop_ends_all_receives_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        bench(GateEngine(capacity=200), start=False, prefetch=0) as it,
        flaky(it, monkeypatch) as (subscription, _),
    ):
        receive = limited(subscription, 0.03)
        for number in range(100):
            await it.send(number)
        it.start()
        await until(lambda: len(receive.under_way) > 4)
        under_way = len(receive.under_way)
        assert it.task is not None
        it.signals.receive("SIGTERM")
        it.signals.receive("SIGTERM")
        await asyncio.wait_for(it.task, 10)
        assert receive.cancelled >= under_way - 1
        assert not receive.under_way


@virtually
async def test_while_the_broker_is_away_it_is_asked_by_one_and_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pauses are drawn at random up to their longest, and many short ones in a row are as good as none to this test.
    monkeypatch.setattr("rejoinder.worker.retry.random.uniform", lambda _low, high: high)
    async with (
        bench(GateEngine(capacity=200), start=False, prefetch=0) as it,
        flaky(it, monkeypatch) as (subscription, _),
    ):
        receive = limited(subscription)
        for number in range(200):
            await it.send(number)
        it.start()
        await until(lambda: receive.most > 4)
        receive.away, receive.calls, receive.most = True, 0, 0
        it.engine.open = True
        for body in list(it.engine.started):
            it.engine.release(body)
        await until(lambda: receive.calls >= 4)
        loop = asyncio.get_running_loop()
        began, calls = loop.time(), receive.calls
        await until(lambda: loop.time() > began + 1.0)
        assert receive.calls <= calls + 8, "it spins"
        receive.away = False
        await it.responses_until(200)


@virtually
async def test_a_broker_that_refuses_ends_the_worker_and_hands_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        bench(GateEngine(), start=False, prefetch=0, grace_seconds=0.1) as it,
        flaky(it, monkeypatch) as (subscription, _),
    ):
        await it.send("a")
        it.start()
        await until(lambda: it.engine.running)
        subscription.fail["receive"] = [Denied("no permission to receive")]
        await it.send("b")  # ends the receive that is under way
        assert it.task is not None
        with pytest.raises(Denied, match="no permission to receive"):
            await asyncio.wait_for(it.task, 20)
        assert (await it.subscription.backlog()).waiting == 2


@virtually
async def test_a_receive_that_never_returns_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rejoinder.worker.receiver.RECEIVE_WAIT", 0.1)
    monkeypatch.setattr("rejoinder.worker.retry.CALL_SECONDS", 0.2)
    async with (
        bench(EchoEngine("/run"), start=False) as it,
        flaky(it, monkeypatch) as (subscription, _),
    ):
        subscription.hang.add("receive")
        it.start()
        await until(lambda: subscription.calls.count("receive") >= 2)
        subscription.hang.clear()
        await it.send("a")
        await it.responses_until(1)
