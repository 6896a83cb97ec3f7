"""What a reviewer would try: capacity that drops, brokers that hang, faults of our own, answers whose ack was lost."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pairs import sqlite
from virtual_time import virtually
from worker_harness import GateEngine, bench, flaky, until, until_empty

from rejoinder.adapters import Transient
from rejoinder.worker import consumer as consumer_module

QUOTING_WORKER = Path(__file__).parents[1] / "support" / "quoting_worker.py"


@virtually
async def test_waiters_are_served_when_a_lost_capacity_comes_back_while_there_is_room() -> None:
    async with bench(GateEngine(capacity=2), prefetch=20) as it:
        for n in range(3):
            await it.send(f"r{n}")
        await until(lambda: len(it.engine.running) == 2)
        it.engine.capacity = 0
        for body in ("r0", "r1"):
            it.engine.release(body)
        await it.responses_until(2)
        it.engine.open = True
        it.engine.capacity = 2
        await it.send("r3")
        assert len(await it.responses_until(4)) == 4


@virtually
async def test_a_message_held_for_long_by_an_idle_worker_s_poll_is_not_late() -> None:
    async with bench(max_hold_seconds=0.5) as it:
        it.engine.open = True
        await asyncio.sleep(1.0)  # idle for longer than a message may be held: the passing of time is what is tested
        await it.send("a")
        (response,) = await it.responses_until(1)
        assert response["status_code"] == 200


@virtually
async def test_an_answer_whose_ack_was_lost_on_the_last_attempt_is_given_again_and_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with (
        bench(start=False, max_attempts=1, request_options="?lease=0.3") as it,
        flaky(it, monkeypatch) as (subscription, _),
    ):
        it.engine.open = True
        subscription.hang |= {"ack", "set_lease"}
        await it.send("a")
        it.start()
        # The lease runs out over the ack that never ends, and the second delivery is one past the cap.
        responses = await it.responses_until(2)
        subscription.hang.clear()
        assert responses[0] == responses[1]
        await until_empty(it)


@virtually
async def test_a_slow_ack_does_not_bring_its_message_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(start=False, request_options="?lease=0.3") as it, flaky(it, monkeypatch) as (subscription, _):
        it.engine.open = True
        subscription.hang.add("ack")
        await it.send("a")
        it.start()
        await it.responses_until(1)
        # Three leases' worth of renewals, and nobody else gets it.
        before = subscription.calls.count("set_lease")
        await until(lambda: subscription.calls.count("set_lease") >= before + 9)
        assert (await it.subscription.backlog()).held == 1
        subscription.hang.clear()
        await until_empty(it)
        await it.stop()
        assert await it.response_subscription.receive(10, 0) == [], "it was answered again"


@virtually
async def test_a_fault_of_ours_in_settling_ends_the_worker_and_keeps_the_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with bench(start=False) as it:
        it.engine.open = True

        async def broken(*_: Any) -> None:
            raise RuntimeError("secret prompt text")

        monkeypatch.setattr("rejoinder.worker.reply.Replier.send", broken)
        await it.send("a")
        it.start()
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(it.task, 20)
        assert (await it.subscription.backlog()).waiting == 1


@virtually
async def test_a_keeper_that_fails_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(start=False, request_options="?lease=0.3", grace_seconds=0.1) as it:

        async def broken(*_: Any) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr("rejoinder.worker.lease.LeaseKeeper._renew", broken)
        await it.send("a")
        it.start()
        with pytest.raises(RuntimeError, match="a bug"):
            await asyncio.wait_for(it.task, 20)


@virtually
async def test_a_fault_of_ours_in_reading_is_that_message_s_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from rejoinder.schemas.envelope import parse_request

    def broken(data: bytes) -> Any:
        if b"poison" in data:
            raise KeyError("secret prompt text")
        return parse_request(data)

    monkeypatch.setattr("rejoinder.worker.handler.parse_request", broken)
    async with bench(max_attempts=2) as it:
        it.engine.open = True
        await it.send("poison")
        await it.send("good")
        responses = await it.responses_until(2)
        assert sorted(response["status_code"] for response in responses) == [200, 500]
        assert "secret" not in json.dumps(responses)


@pytest.mark.parametrize("log_format", ["json", "console"])
async def test_logs_never_say_what_a_request_says(tmp_path: Path, log_format: str) -> None:
    queues = sqlite(tmp_path)
    worker = subprocess.Popen(
        [sys.executable, str(QUOTING_WORKER), queues.requests, queues.responses, log_format], stderr=subprocess.PIPE
    )
    await queues.send(json.dumps({"metadata": {"who": "SECRET METADATA"}, "body": "SECRET PROMPT"}).encode())
    await queues.receive(1)
    worker.terminate()
    logged = (await asyncio.to_thread(worker.communicate, timeout=120))[1].decode()
    assert worker.returncode == 0
    assert "engine_error" in logged
    assert "SECRET" not in logged


@pytest.mark.parametrize("signals", [1, 2])
@virtually
async def test_a_response_broker_that_hangs_does_not_keep_a_stopping_worker(
    monkeypatch: pytest.MonkeyPatch, signals: int
) -> None:
    monkeypatch.setattr(consumer_module, "LAST_SECONDS", 0.2)
    grace = 0.2 if signals == 1 else 1000.0
    async with bench(start=False, grace_seconds=grace) as it, flaky(it, monkeypatch) as (_, topic):
        it.engine.open = True
        topic.hang.add("publish")
        await it.send("a")
        it.start()
        await until(lambda: "publish" in topic.calls)
        for _ in range(signals):
            it.signals.receive("SIGTERM")
        await asyncio.wait_for(it.task, 10)
        assert (await it.subscription.backlog()).waiting == 1


@virtually
async def test_one_answer_that_the_broker_never_takes_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(start=False, grace_seconds=0.1) as it, flaky(it, monkeypatch) as (_, topic):
        it.engine.open = True

        async def publish(batch: Any) -> list[Any]:
            outcomes = await topic.inner.publish([outgoing for outgoing in batch if b"stuck" not in outgoing.body])
            return [Transient("never") if b"stuck" in outgoing.body else outcomes.pop(0) for outgoing in batch]

        topic.publish = publish
        for body in ("a", "stuck", "b"):
            await it.send(body)
        it.start()
        responses = await it.responses_until(2)
        assert [response["body"]["ran"] for response in responses] == ["a", "b"]


@virtually
async def test_what_is_held_is_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumer_module, "MAX_HELD_BYTES", 10_000)
    async with bench(GateEngine(capacity=1), prefetch=0) as it:
        it.engine.capacity = 100
        for n in range(10):
            await it.send(f"{n}" * 6000)
            if n < 2:
                await until(lambda n=n: len(it.engine.running) == n + 1)
        await asyncio.sleep(0)
        assert (await it.subscription.backlog()).held == 2
        it.engine.open = True
        for body in list(it.engine.started):
            it.engine.release(body)
        await it.responses_until(10)
