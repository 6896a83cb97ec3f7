"""What goes wrong with a stream: it ends with an error as its last message, and nothing else is touched."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from store_harness import files
from talking import STREAM, Talker, flattened, place, places, streaming_bench
from virtual_time import virtually
from worker_harness import LIMIT, bench, flaky, until, until_backlog, until_empty

from rejoinder.adapters import AdapterError, Denied, Outgoing, TooLarge, Transient
from rejoinder.adapters.errors import Refused
from rejoinder.worker import streaming
from rejoinder.worker.errors import BadRequest, Cancelled, Failed, RetryableError, Unavailable


@virtually
async def test_while_the_broker_is_away_the_rest_gathers_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(Talker(), start=False, stream_interval_ms=0) as it, flaky(it, monkeypatch) as (_, topic):
        it.start()
        engine = await streaming_bench(it, "a")
        topic.fail["publish"] = [Transient("away")] * 3
        for n in range(10):
            engine.say("a", n)
            await asyncio.sleep(0)
        engine.end("a")
        await until(lambda: it.got or not topic.fail["publish"])
        got = await it.responses_until(3)
        assert [*flattened(got[:-1])] == [*range(10)]
        assert [one["stream"]["index"] for one in got] == [0, 1, 2]
        await until_empty(it)


@virtually
async def test_too_much_waiting_for_the_broker_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MAX_WAITING", 1000)
    async with bench(Talker(), start=False) as it, flaky(it, monkeypatch) as (_, topic):
        it.start()
        engine = await streaming_bench(it, "a")
        topic.hang.add("publish")
        engine.say("a", "x" * 500)
        await until(lambda: topic.under_way)
        engine.say("a", "x" * 600)
        await until(lambda: engine.cancelled == ["a"])
        topic.hang.clear()
        got = await it.responses_until(2)
        assert got[1]["status_code"] == 500
        assert "wait for the response broker" in got[1]["body"]["error"]["message"]
        assert got[1]["stream"] == place(1, done=True, chunks=0)
        await until_empty(it)


BAD_CHUNKS = [
    pytest.param(float("nan"), "JSON", id="nan"),
    pytest.param({"a": object()}, "JSON", id="object"),
    pytest.param("x" * 300_000, "too large", id="large"),
]


@pytest.mark.parametrize(("chunk", "reason"), BAD_CHUNKS)
@virtually
async def test_a_chunk_that_cannot_be_sent_is_the_end_of_its_stream_alone(
    chunk: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rejoinder.adapters.memory.MemoryTopic.max_body", 262_144)
    async with bench(Talker(), stream_interval_ms=0) as it:
        engine = await streaming_bench(it, "a", "b")
        engine.say("a", "good")
        await it.responses_until(1)
        engine.say("a", chunk, "never")
        await until(lambda: engine.cancelled == ["a"])
        got = await it.responses_until(2)
        assert got[1]["status_code"] == 500
        assert reason in got[1]["body"]["error"]["message"]
        assert got[1]["stream"] == place(1, done=True, chunks=0)
        engine.say("b", 1)
        engine.end("b", 2)
        assert places((await it.responses_until(4))[2:]) == [(1, 0, False), (2, 1, True)]
        await until_empty(it)


@pytest.mark.parametrize("chunk", [float("nan"), "x" * 300_000])
@virtually
async def test_what_was_said_before_a_bad_chunk_is_published(chunk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rejoinder.adapters.memory.MemoryTopic.max_body", 262_144)
    async with bench(Talker(), stream_interval_ms=60_000) as it:
        engine = await streaming_bench(it, "a")
        engine.say("a", 1)
        await it.responses_until(1)
        engine.say("a", 2, 3, chunk, 4)
        got = await it.responses_until(3)
        assert places(got[:2]) == [(1, 0, False), ([2, 3], 1, False)]
        assert (got[2]["status_code"], got[2]["stream"]) == (500, place(2, done=True, chunks=0))
        await until_empty(it)


@virtually
async def test_a_bad_chunk_just_before_the_end_is_the_answer_too() -> None:
    async with bench(Talker()) as it:
        engine = await streaming_bench(it, "a")
        engine.say("a", float("inf"))
        engine.end("a", "all is well")
        (response,) = await it.responses_until(1)
        assert response["status_code"] == 500
        assert response["stream"] == place(0, done=True, chunks=0)


@pytest.mark.parametrize(
    ("outcome", "code"), [(TooLarge("too large"), "response_too_large"), (Refused("its schema"), None)]
)
@virtually
async def test_a_message_that_the_broker_does_not_take_is_the_end_of_its_stream(
    outcome: AdapterError, code: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(Talker(), start=False, stream_interval_ms=0) as it, flaky(it, monkeypatch) as (_, topic):
        it.start()
        engine = await streaming_bench(it, "a")
        inner = topic.inner.publish
        topic.inner.publish = refusing(inner, b'"bad"', outcome)
        engine.say("a", "good")
        await it.responses_until(1)
        engine.say("a", "bad")
        got = await it.responses_until(2)
        assert engine.cancelled == ["a"]
        assert (got[1]["status_code"], got[1]["body"]["error"]["code"]) == (500, code)
        assert got[1]["stream"] == place(1, done=True, chunks=0)
        await until_empty(it)


def refusing(publish: Any, what: bytes, outcome: AdapterError) -> Any:
    async def refuse(batch: Sequence[Outgoing]) -> list[str | AdapterError]:
        return [outcome if what in one.body else (await publish([one]))[0] for one in batch]

    return refuse


@virtually
async def test_a_broker_that_refuses_for_good_ends_the_worker_and_keeps_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with bench(Talker(), start=False) as it, flaky(it, monkeypatch) as (_, topic):
        it.start()
        engine = await streaming_bench(it, "a")
        topic.fail["publish"] = [Denied("no permission")]
        engine.say("a", 1)
        assert it.task is not None
        with pytest.raises(Denied):
            await asyncio.wait_for(asyncio.shield(it.task), LIMIT)
        assert engine.cancelled == ["a"]
        await until_backlog(it, lambda backlog: backlog.waiting == 1)


@virtually
async def test_a_last_body_that_is_no_json_is_an_error_in_its_place() -> None:
    async with bench(Talker(), stream_interval_ms=0) as it:
        engine = await streaming_bench(it, "a")
        engine.say("a", 1)
        await it.responses_until(1)
        engine.end("a", float("nan"))
        got = await it.responses_until(2)
        assert (got[1]["status_code"], got[1]["stream"]) == (500, place(1, done=True, chunks=0))


@pytest.mark.parametrize("stores", [False, True])
@pytest.mark.parametrize("limit", [1000, 100_000])
async def test_a_last_body_that_is_too_large_is_an_error_in_its_place(
    stores: bool, limit: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("rejoinder.adapters.embedded.MAX_BODY", limit)
    monkeypatch.setattr("rejoinder.adapters.memory.MemoryTopic.max_body", limit)
    async with bench(Talker(), **({"blobs": f"file://{tmp_path}"} if stores else {})) as it:
        engine = await streaming_bench(it, "a")
        engine.end("a", "x" * 110_000)
        (response,) = await it.responses_until(1)
        assert response["status_code"] == 500
        assert response["body"]["error"]["code"] == "response_too_large"
        assert response["stream"] == place(0, done=True, chunks=0)
        assert not [name for name in files(tmp_path) if name.startswith("outputs")]


@pytest.mark.parametrize("error", [BadRequest("no", param="body.x"), Cancelled("its sender does not want it")])
@virtually
async def test_an_error_is_a_stream_s_last_message(error: Exception) -> None:
    async with bench(Talker(), stream_interval_ms=60_000) as it:
        engine = await streaming_bench(it, "a")
        engine.say("a", 1)
        await it.responses_until(1)
        engine.say("a", 2)
        engine.end("a", error)
        got = await it.responses_until(3)
        assert places(got[:2]) == [(1, 0, False), (2, 1, False)], "what was said before it is not lost"
        assert got[2]["status_code"] == error.status_code  # type: ignore[attr-defined]
        assert got[2]["stream"] == place(2, done=True, chunks=0)
        await until_empty(it)


@virtually
async def test_a_timeout_in_the_middle_is_a_stream_s_last_message() -> None:
    async with bench(Talker(), stream_interval_ms=0, invocation_timeout_seconds=0.3) as it:
        engine = await streaming_bench(it, "a")
        engine.say("a", 1)
        got = await it.responses_until(2)
        assert engine.cancelled == ["a"]
        assert (got[1]["status_code"], got[1]["stream"]) == (504, place(1, done=True, chunks=0))
        engine.say("a", "too late")
        await until_empty(it)
        assert not await it.response_subscription.receive(1, 0.05)


@virtually
async def test_a_retryable_error_ends_nothing_and_the_next_attempt_is_a_new_stream() -> None:
    async with bench(Talker(), stream_interval_ms=0, max_attempts=3) as it:
        engine = await streaming_bench(it, "a")
        for attempt, error in enumerate([Unavailable("busy"), Failed("broken"), None], start=1):
            await engine.begun("a", times=attempt)
            engine.say("a", "x", "y")
            await it.responses_until(attempt)
            engine.say("a", "z")
            engine.end("a", error)
        got = await it.responses_until(5)
        await until_empty(it)
        assert len(it.got) == len(got)
        told = [(one["stream"]["attempt"], one["stream"]["index"], one["stream"]["done"]) for one in got]
        assert told[-2:] == [(3, 1, False), (3, 2, True)]
        assert [one for one in told if one[1] == 0] == [(1, 0, False), (2, 0, False), (3, 0, False)]
        assert not [one for one in told[:-1] if one[2]]


@virtually
async def test_the_last_attempt_s_error_is_answered() -> None:
    async with bench(Talker(), stream_interval_ms=0, max_attempts=1) as it:
        engine = await streaming_bench(it, "a")
        engine.say("a", 1)
        engine.end("a", RetryableError("not today"))
        got = await it.responses_until(2)
        assert (got[1]["status_code"], got[1]["stream"]) == (503, place(1, done=True, chunks=0))
        await until_empty(it)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"options": {**STREAM, "filename": "a.txt"}}, 400, "options.stream"),
        ({"options": {**STREAM, "output_path_extension": "a"}}, 400, "options.stream"),
        ({"options": {**STREAM, "inference_id": "gone", "deadline": "2020-01-01T00:00:00Z"}}, 408, None),
    ],
)
@virtually
async def test_what_cannot_be_a_stream_is_refused(fields: dict[str, Any], status: int, param: str | None) -> None:
    async with bench(Talker()) as it:
        await it.send("a", **fields)
        (response,) = await it.responses_until(1)
        assert (response["status_code"], response["body"]["error"]["param"]) == (status, param)
        assert not it.engine.started
        # Whether the request asks for a stream is not asked of one that is refused as it is read.
        assert response.get("stream") == (None if status == 408 else place(0, done=True, chunks=0))
        await until_empty(it)


async def test_lines_cannot_be_a_stream(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"1\n2\n")
    async with bench(Talker(), blobs=f"file://{tmp_path}") as it:
        envelope = {"path": "/run", "metadata": {}, "input_location": f"file://{tmp_path}/in.jsonl", "options": STREAM}
        await it.send_raw(json.dumps(envelope).encode())
        (response,) = await it.responses_until(1)
        assert (response["status_code"], response["body"]["error"]["param"]) == (400, "options.stream")
        assert not it.engine.started
