"""The worker's promises, on the memory broker: it expires leases and redelivers like the real ones."""

import asyncio
import json
from typing import Any

import pytest
from virtual_time import virtually
from worker_harness import GateEngine, bench, flaky, until, until_backlog, until_empty

from rejoinder.adapters import Message, Outgoing, Transient, open_subscription
from rejoinder.worker.engines.echo import EchoEngine
from rejoinder.worker.engines.protocol import EngineRequest
from rejoinder.worker.errors import BadRequest, Failed, Unavailable


@virtually
async def test_a_response_rejoins_its_request() -> None:
    async with bench() as it:
        it.engine.open = True
        message_id = await it.send("a", {"doc": 17, "big": 2**70})
        (response,) = await it.responses_until(1)
        assert response == {"status_code": 200, "metadata": {"doc": 17, "big": 2**70}, "body": {"ran": "a"}}
        attributes = it.got[0][1].attributes
        assert attributes["request_message_id"] == message_id
        assert attributes["attempt"] == "1"
        assert len(attributes["response_id"]) == 32
        await until_empty(it)
        await it.stop()


@virtually
async def test_the_trace_context_travels() -> None:
    async with bench(EchoEngine("/v1/completions")) as it:
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        await it.request_topic.publish([Outgoing(b'{"metadata":{},"body":1}', {"traceparent": parent, "other": "x"})])
        await it.responses_until(1)
        assert it.got[0][1].attributes["traceparent"] == parent
        assert "other" not in it.got[0][1].attributes


@virtually
async def test_a_message_is_acked_only_after_its_response_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(start=False) as it, flaky(it, monkeypatch) as (subscription, topic):
        it.engine.open = True
        topic.hang.add("publish")
        await it.send("a")
        it.start()
        await until(lambda: "publish" in topic.calls)
        assert "ack" not in subscription.calls
        assert (await it.subscription.backlog()).held == 1
        topic.hang.clear()
        await it.responses_until(1)
        await until_empty(it)
        assert "ack" in subscription.calls


@virtually
async def test_no_more_is_held_than_slots_and_prefetch() -> None:
    async with bench(GateEngine(capacity=3), prefetch=2) as it:
        for n in range(20):
            await it.send(f"r{n}")
        await until(lambda: len(it.engine.running) == 3)
        await asyncio.sleep(0)
        for _ in range(50):
            backlog = await it.subscription.backlog()
            assert backlog.held <= 5
            assert len(it.engine.running) <= 3
            await asyncio.sleep(0.001)
        it.engine.open = True
        for body in list(it.engine.started):
            it.engine.release(body)
        await it.responses_until(20)


@virtually
async def test_requests_shorter_than_a_receive_are_held_for_as_long_as_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = GateEngine(capacity=1)
    engine.open = True
    async with bench(engine, start=False) as it, flaky(it, monkeypatch) as (subscription, _):
        asked: list[int] = []

        async def receive(limit: int, wait: float) -> list[Message]:
            asked.append(limit)
            messages: list[Message] = await subscription.inner.receive(limit, wait)
            await asyncio.sleep(0.05)  # a broker far away
            return messages

        monkeypatch.setattr(subscription, "receive", receive, raising=False)
        for n in range(300):
            await it.send(n)
        it.start()
        await it.responses_until(300)
        assert max(asked) > 4


@virtually
async def test_a_bad_request_needs_no_slot() -> None:
    async with bench(GateEngine(capacity=1), prefetch=1) as it:
        await it.send("blocks")
        await until(lambda: it.engine.running)
        await it.send_raw(b"not json")
        (response,) = await it.responses_until(1)
        assert response["status_code"] == 400
        assert response["metadata"] is None


@virtually
async def test_leases_of_running_and_waiting_messages_are_renewed() -> None:
    async with bench(GateEngine(capacity=1), request_options="?lease=0.3", prefetch=3) as it:
        for n in range(3):
            await it.send(f"r{n}")
        await until(lambda: it.engine.running)
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with open_subscription(it.requests) as thief:
            while loop.time() - began < 1.5:  # five leases long
                assert await thief.receive(10, 0.05) == []
        for n in range(3):
            await until(lambda n=n: json.dumps(f"r{n}") in it.engine.running)
            it.engine.release(f"r{n}")
        await it.responses_until(3)
        assert all(message.attributes["attempt"] == "1" for _, message in it.got)


@virtually
async def test_a_lost_lease_stops_the_work_and_suppresses_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    one = GateEngine(capacity=1)
    async with (
        bench(one, start=False, prefetch=0, request_options="?lease=0.3") as it,
        flaky(it, monkeypatch) as (subscription, _),
    ):
        subscription.fail["set_lease"] = [Transient("away")] * 100
        await it.send("a")
        it.start()
        await until(lambda: it.engine.running)
        async with open_subscription(it.requests) as other_worker:
            (taken,) = await other_worker.receive(1, 10)
            assert taken.attempt == 2
            subscription.fail.clear()
            await until(lambda: it.engine.cancelled == ["a"])
            await other_worker.ack([taken])
        assert await it.response_subscription.receive(1, 0.2) == []
        await until_empty(it)


@virtually
async def test_a_worker_that_slept_past_its_lease_asks_before_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    one = GateEngine(capacity=1)
    async with (
        bench(one, start=False, prefetch=0, request_options="?lease=0.3") as it,
        flaky(it, monkeypatch) as (subscription, topic),
    ):
        subscription.hang.add("set_lease")  # as if the process had been suspended: no renewal, no news
        await it.send("a")
        it.start()
        await until(lambda: it.engine.running)
        async with open_subscription(it.requests) as other_worker:
            (taken,) = await other_worker.receive(1, 10)
            subscription.hang.clear()
            it.engine.release("a")
            await until(lambda: "a" not in map(json.loads, it.engine.running))
            await other_worker.ack([taken])
            await it.stop()
        assert "publish" not in topic.calls


@virtually
async def test_a_retryable_error_comes_back_and_succeeds() -> None:
    async with bench() as it:
        it.engine.open = True
        it.engine.errors["a"] = [Unavailable("busy"), Failed("odd")]
        await it.send("a")
        (response,) = await it.responses_until(1)
        assert response["status_code"] == 200
        assert it.got[0][1].attributes["attempt"] == "3"
        assert it.engine.started == ["a", "a", "a"]


@pytest.mark.parametrize(("error", "status"), [(Unavailable, 503), (Failed, 500)])
@virtually
async def test_the_last_attempt_s_error_is_answered(error: type[Exception], status: int) -> None:
    async with bench(max_attempts=3) as it:
        it.engine.open = True
        it.engine.errors["a"] = [error(f"try {n}") for n in range(1, 9)]
        await it.send("a", {"k": [1]})
        (response,) = await it.responses_until(1)
        assert response["status_code"] == status
        assert response["metadata"] == {"k": [1]}
        assert response["body"]["error"]["message"] == "try 3"
        await until_empty(it)
        assert len(it.engine.started) == 3


@virtually
async def test_after_the_last_attempt_a_dead_letter_policy_gets_the_message() -> None:
    async with bench(request_options="?max_attempts=2", max_attempts=9) as it:
        it.engine.open = True
        it.engine.errors["a"] = [Failed(f"try {n}") for n in range(1, 9)]
        await it.send("a")
        (response,) = await it.responses_until(1)
        assert response["status_code"] == 500
        await until_backlog(it, lambda backlog: backlog.dead == 1)
        backlog = await it.subscription.backlog()
        assert (backlog.waiting, backlog.held, backlog.dead) == (0, 0, 1)
        assert len(it.engine.started) == 2


@virtually
async def test_a_message_whose_deliveries_all_end_unseen_is_given_up() -> None:
    async with bench(start=False, max_attempts=2) as it:
        await it.send("a")
        for _ in range(4):  # workers that died with it, twice as many as attempts are allowed
            (message,) = await it.subscription.receive(1, 5)
            await it.subscription.set_lease([message], 0)
        it.start()
        (response,) = await it.responses_until(1)
        assert response["status_code"] == 503
        assert "4 deliveries" in response["body"]["error"]["message"]
        assert it.engine.started == []


@virtually
async def test_an_unforeseen_error_is_that_request_s_own() -> None:
    async with bench(max_attempts=1) as it:
        it.engine.open = True
        it.engine.errors["a"] = [ZeroDivisionError("secret prompt text")]
        await it.send("a")
        await it.send("b")
        await it.responses_until(2)
        by_status = {response["status_code"]: response for response, _ in it.got}
        assert "ZeroDivisionError" in by_status[500]["body"]["error"]["message"]
        assert "secret" not in json.dumps(by_status[500])
        assert by_status[200]["body"] == {"ran": "b"}


@virtually
async def test_an_error_that_is_not_retryable_is_answered_at_once() -> None:
    async with bench() as it:
        it.engine.open = True
        it.engine.errors["a"] = [BadRequest("temperature is 9", param="temperature")]
        await it.send("a")
        (response,) = await it.responses_until(1)
        assert response["status_code"] == 400
        assert response["body"]["error"]["param"] == "temperature"
        assert it.engine.started == ["a"]


@virtually
async def test_an_invocation_that_takes_too_long_is_answered_504_and_stopped() -> None:
    async with bench(invocation_timeout_seconds=0.1) as it:
        await it.send("a")
        (response,) = await it.responses_until(1)
        assert response["status_code"] == 504
        assert it.engine.cancelled == ["a"]


@virtually
async def test_a_message_held_too_long_is_answered_504() -> None:
    async with bench(GateEngine(capacity=1), max_hold_seconds=0.3, prefetch=1) as it:
        await it.send("runs")
        await it.send("waits")
        responses = await it.responses_until(2)
        assert [response["status_code"] for response in responses] == [504, 504]
        assert it.engine.started[0] == "runs"


@virtually
async def test_a_result_that_is_no_json_is_an_error_of_that_request() -> None:
    class NaN(GateEngine):
        async def generate(self, request: EngineRequest) -> Any:
            return {"x": float("nan")}

    async with bench(NaN()) as it:
        await it.send("a", {"id": 4})
        (response,) = await it.responses_until(1)
        assert (response["status_code"], response["metadata"]) == (500, {"id": 4})


@virtually
async def test_a_response_larger_than_its_broker_is_an_error_with_its_metadata() -> None:
    from rejoinder.adapters.embedded import MAX_BODY

    class Large(GateEngine):
        async def generate(self, request: EngineRequest) -> Any:
            return "x" * MAX_BODY

    async with bench(Large()) as it:
        await it.send("a", {"id": 4})
        (response,) = await it.responses_until(1)
        assert (response["status_code"], response["metadata"]) == (500, {"id": 4})
        assert response["body"]["error"]["code"] == "response_too_large"


@virtually
async def test_a_request_over_the_limit_is_413_with_its_metadata() -> None:
    async with bench(max_request_bytes=1000) as it:
        await it.send("x" * 1000, {"id": 4})
        (response,) = await it.responses_until(1)
        assert (response["status_code"], response["metadata"]) == (413, {"id": 4})


async def test_a_large_request_is_parsed_off_the_loop_and_answered() -> None:
    async with bench(EchoEngine("/run")) as it:
        await it.send("x" * 1_000_000, {"id": 4})
        (response,) = await it.responses_until(1)
        assert response["body"] == "x" * 1_000_000
