"""Brokers that are away, hang or refuse: at the start, and in the middle of the work."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from virtual_time import virtually
from worker_harness import GateEngine, bench, flaky, until, until_empty

from rejoinder.adapters import Denied, NotFound, Transient, open_subscription, open_topic
from rejoinder.worker import service


class Opening:
    """Stands in for `open_subscription` or `open_topic`: fails as it is told, then opens."""

    def __init__(self, real: Any, *errors: Exception) -> None:
        self._real = real
        self._errors = list(errors)
        self.tries = 0
        self.hang = False

    @contextlib.asynccontextmanager
    async def __call__(self, url: str) -> AsyncIterator[Any]:
        self.tries += 1
        if self.hang:
            await asyncio.Event().wait()
        if self._errors:
            raise self._errors.pop(0)
        async with self._real(url) as opened:
            yield opened


@pytest.mark.parametrize("which", ["open_subscription", "open_topic"])
@virtually
async def test_a_broker_that_is_away_at_the_start_is_waited_for(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    opening = Opening(getattr(service, which), Transient("away"), Transient("busy"))
    monkeypatch.setattr(service, which, opening)
    async with bench() as it:
        it.engine.open = True
        await it.send("a")
        await it.responses_until(1)
        assert opening.tries == 3
        await it.stop()


@pytest.mark.parametrize("which", ["open_subscription", "open_topic"])
@pytest.mark.parametrize("error", [NotFound("no queue 'x'"), Denied("no permission sqs:ReceiveMessage")])
@virtually
async def test_a_broker_that_refuses_ends_the_start_at_once(
    monkeypatch: pytest.MonkeyPatch, which: str, error: Exception
) -> None:
    opening = Opening(getattr(service, which), error)
    monkeypatch.setattr(service, which, opening)
    async with bench() as it:
        assert it.task is not None
        with pytest.raises(type(error), match=str(error)):
            await asyncio.wait_for(it.task, 10)
        assert opening.tries == 1


@virtually
async def test_a_broker_that_stays_away_ends_the_start_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "START_SECONDS", 0.2)
    opening = Opening(open_topic, *[Transient("cannot reach the broker")] * 1000)
    monkeypatch.setattr(service, "open_topic", opening)
    async with bench() as it:
        assert it.task is not None
        with pytest.raises(Transient, match="cannot reach the broker"):
            await asyncio.wait_for(it.task, 20)


@virtually
async def test_a_broker_that_never_answers_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "START_SECONDS", 0.1)
    monkeypatch.setattr(service, "GRACE_OF_START", 0.1)
    opening = Opening(open_topic)
    opening.hang = True
    monkeypatch.setattr(service, "open_topic", opening)
    async with bench() as it:
        assert it.task is not None
        with pytest.raises(Transient, match="did not answer"):
            await asyncio.wait_for(it.task, 20)


@pytest.mark.parametrize("hang", [True, False])
@virtually
async def test_a_stop_ends_the_wait_for_a_broker(monkeypatch: pytest.MonkeyPatch, hang: bool) -> None:
    opening = Opening(open_subscription, *[Transient("away")] * 1000)
    opening.hang = hang
    monkeypatch.setattr(service, "open_subscription", opening)
    async with bench() as it:
        await until(lambda: opening.tries >= 1)
        await it.stop()
        assert it.engine.started == []


@pytest.mark.parametrize("call", ["publish", "ack"])
@virtually
async def test_a_call_that_never_returns_is_made_again(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr("rejoinder.worker.retry.CALL_SECONDS", 0.2)
    async with bench(start=False, request_options="?lease=0.6") as it, flaky(it, monkeypatch) as parts:
        part = parts[call == "publish"]
        it.engine.open = True
        part.hang.add(call)
        await it.send("a")
        it.start()
        await until(lambda: part.calls.count(call) >= 2)
        part.hang.clear()
        await it.responses_until(1)
        await until_empty(it)
        assert it.got[0][1].attributes["attempt"] == "1", "its lease was kept meanwhile"
        await it.stop()


@virtually
async def test_all_calls_fail_for_a_while_and_everything_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both brokers away for two leases: nothing spins, nothing dies, lost leases say nothing, all is answered."""
    async with (
        bench(GateEngine(capacity=20), start=False, request_options="?lease=0.5") as it,
        flaky(it, monkeypatch) as (subscription, topic),
    ):
        for number in range(40):
            await it.send(number)
        it.start()
        await until(lambda: len(it.engine.running) == 20)
        for part in (subscription, topic):
            part.fail = {name: [Transient("away")] * 100_000 for name in ("receive", "ack", "set_lease", "publish")}
            part.calls.clear()
        it.engine.open = True
        for body in list(it.engine.started):
            it.engine.release(body)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await until(lambda: loop.time() > began + 1.0)
        calls = {name: subscription.calls.count(name) for name in ("receive", "ack", "set_lease")}
        # Each answer is tried again by itself, several in one call.
        assert topic.calls.count("publish") <= 20 * 12, "it spins"
        assert calls["receive"] <= 12
        assert calls["set_lease"] <= 24, "a twelfth of a lease between two"
        for part in (subscription, topic):
            part.fail.clear()
        await it.responses_until(40)
        await until_empty(it)
        ids = {message.attributes["request_message_id"] for _, message in it.got}
        assert len(ids) == 40
        await it.stop()


@pytest.mark.parametrize("call", ["ack", "set_lease"])
@virtually
async def test_a_request_broker_that_refuses_to_settle_ends_the_worker(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    async with (
        bench(start=False, request_options="?lease=0.3", grace_seconds=0.1) as it,
        flaky(it, monkeypatch) as (subscription, _),
    ):
        subscription.fail[call] = [Denied(f"no permission to {call}")]
        it.engine.open = call == "ack"
        await it.send("a")
        it.start()
        assert it.task is not None
        with pytest.raises(Denied, match=f"no permission to {call}"):
            await asyncio.wait_for(it.task, 20)
        assert (await it.subscription.backlog()).waiting == 1
