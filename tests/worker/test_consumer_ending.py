"""How a worker stops, on the memory broker, and what it makes of brokers that fail."""

import asyncio

import pytest
from virtual_time import virtually
from worker_harness import GateEngine, bench, flaky, until, until_backlog, until_empty

from rejoinder.adapters import Denied, Transient
from rejoinder.worker.errors import EngineGone

# ---------------------------------------------------------------------------------------------------- stopping


@virtually
async def test_a_stop_hands_waiting_messages_back_at_once_and_lets_running_ones_finish() -> None:
    async with bench(GateEngine(capacity=1), prefetch=5) as it:
        for n in range(4):
            await it.send(f"r{n}")
        await until(lambda: it.engine.running)
        await until_backlog(it, lambda backlog: backlog.held == 4)
        it.signals.receive("SIGTERM")
        await until_backlog(it, lambda backlog: backlog.waiting == 3)
        backlog = await it.subscription.backlog()
        assert (backlog.waiting, backlog.held) == (3, 1)
        assert not it.task.done()
        it.engine.release("r0")
        await asyncio.wait_for(it.task, 10)
        assert [r["body"] for r in await it.responses_until(1)] == [{"ran": "r0"}]
        assert (await it.subscription.backlog()).held == 0


@virtually
async def test_what_still_runs_after_the_grace_is_handed_back() -> None:
    async with bench(grace_seconds=0.1) as it:
        await it.send("a")
        await until(lambda: it.engine.running)
        it.signals.receive("SIGTERM")
        await asyncio.wait_for(it.task, 10)
        assert it.engine.cancelled == ["a"]
        assert (await it.subscription.backlog()).waiting == 1
        assert await it.response_subscription.receive(1, 0.05) == []


@virtually
async def test_a_second_signal_hands_everything_back_now() -> None:
    async with bench(grace_seconds=1000) as it:
        await it.send("a")
        await until(lambda: it.engine.running)
        it.signals.receive("SIGTERM")
        it.signals.receive("SIGTERM")
        await asyncio.wait_for(it.task, 10)
        assert (await it.subscription.backlog()).waiting == 1


@virtually
async def test_an_engine_that_is_gone_ends_the_worker_and_hands_back() -> None:
    async with bench(GateEngine(capacity=1), prefetch=3, grace_seconds=0.1) as it:
        for n in range(3):
            await it.send(f"r{n}")
        await until(lambda: it.engine.running)
        it.engine.gone.set()
        with pytest.raises(EngineGone):
            await asyncio.wait_for(it.task, 10)
        assert (await it.subscription.backlog()).waiting == 3


@virtually
async def test_capacity_that_comes_back_is_noticed() -> None:
    async with bench(GateEngine(capacity=0)) as it:
        it.engine.open = True
        await it.send("a")
        await asyncio.sleep(0)
        assert it.engine.started == []
        it.engine.capacity = 2
        await it.responses_until(1)


# ---------------------------------------------------------------------------------------------------- brokers that fail


@virtually
async def test_a_broker_that_goes_away_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(start=False) as it, flaky(it, monkeypatch) as (subscription, topic):
        it.engine.open = True
        topic.fail["publish"] = [Transient("away"), Transient("away")]
        subscription.fail["ack"] = [Transient("away")]
        subscription.fail["receive"] = [Transient("away"), Transient("away")]
        await it.send("a")
        it.start()
        await it.responses_until(1)
        await until_empty(it)
        assert topic.calls.count("publish") == 3
        assert subscription.calls.count("ack") == 2
        await it.stop()


@virtually
async def test_a_response_topic_that_refuses_ends_the_worker_with_the_message_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with bench(start=False) as it, flaky(it, monkeypatch) as (_, topic):
        it.engine.open = True
        topic.fail["publish"] = [Denied("no permission to publish")]
        await it.send("a")
        it.start()
        with pytest.raises(Denied, match="no permission"):
            await asyncio.wait_for(it.task, 10)
        assert (await it.subscription.backlog()).waiting == 1
