"""Streams: chunks in order while the engine runs, the answer as their last message, and nothing after a lost lease."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from group_queue import GroupQueue, opener
from store_harness import answered, files
from talking import STREAM, Talker, place, places, streaming_bench
from virtual_time import virtually
from worker_harness import bench, flaky, until, until_empty

from rejoinder.adapters import Outgoing
from rejoinder.worker.engines.protocol import WithHeaders


@virtually
async def test_chunks_come_while_the_engine_runs_and_the_answer_last() -> None:
    async with bench(Talker(), stream_interval_ms=0) as it:
        engine = await streaming_bench(it, "a")
        for n, chunk in enumerate(["one", {"two": 2}, [3], None]):
            engine.say("a", chunk)
            got = await it.responses_until(n + 1)
            assert got[n] == {"status_code": 200, "metadata": {"n": 1}, "body": chunk, "stream": place(n)}
        engine.end("a", {"usage": 4})
        got = await it.responses_until(5)
        await until_empty(it)
        assert got[4] == {
            "status_code": 200,
            "metadata": {"n": 1},
            "body": {"usage": 4},
            "stream": place(4, done=True),
        }
        assert len({message.attributes["response_id"] for _, message in it.got}) == 1
        assert {message.attributes["attempt"] for _, message in it.got} == {"1"}


@virtually
async def test_chunks_that_come_together_go_together() -> None:
    async with bench(Talker(), stream_interval_ms=60_000) as it:
        engine = await streaming_bench(it, "a")
        engine.say("a", "first")
        (first,) = await it.responses_until(1)
        assert first["body"] == "first", "the first chunk does not wait"
        engine.say("a", 1, [2], None)
        assert not await it.response_subscription.receive(1, 0.1)
        engine.end("a")
        got = await it.responses_until(3)
        assert got[1]["body"] == [1, [2], None]
        assert got[1]["stream"] == place(1, chunks=3)
        assert got[2]["body"] is None
        assert got[2]["stream"] == place(2, done=True, chunks=0)


@virtually
async def test_much_of_a_stream_does_not_wait() -> None:
    async with bench(Talker(), stream_interval_ms=60_000, stream_max_bytes=100) as it:
        engine = await streaming_bench(it, "a")
        engine.say("a", "first")
        await it.responses_until(1)
        engine.say("a", *["x" * 30] * 5)
        got = await it.responses_until(2)
        assert got[1]["stream"]["chunks"] == 3, "no message has more than stream_max_bytes"
        engine.end("a")
        got = await it.responses_until(4)
        assert [len(one["body"] or ()) for one in got[1:]] == [3, 2, 0]


@pytest.mark.parametrize("path", ["/v1/completions", "/run"])
@virtually
async def test_openai_s_chunks_become_one(path: str) -> None:
    def token(text: str) -> dict[str, Any]:
        return {"id": "x", "object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": None}]}

    async with bench(Talker(), stream_interval_ms=60_000) as it:
        engine = await streaming_bench(it, "a", path=path)
        engine.say("a", token("Once"))
        await it.responses_until(1)
        engine.say("a", *map(token, [" upon", " a", " time"]))
        engine.end("a", {"choices": [], "usage": {}})
        got = await it.responses_until(3)
        if path == "/run":
            assert got[1]["body"] == [token(" upon"), token(" a"), token(" time")]
        else:
            assert got[1] == {**got[1], "body": token(" upon a time"), "stream": place(1)}


@virtually
async def test_a_request_without_stream_is_asked_for_none() -> None:
    async with bench(Talker()) as it:
        await it.send("a", options={"stream": False})
        await it.engine.begun("a")
        assert it.engine.requests["a"].emit is None
        it.engine.end("a", 1)
        (response,) = await it.responses_until(1)
        assert "stream" not in response


@virtually
async def test_the_engine_is_told_the_headers_that_the_options_are() -> None:
    async with bench(Talker()) as it:
        await it.send("a", options={"content_type": "text/csv", "custom_attributes": "k=v"})
        await it.send("b", options={"inference_id": "b"})
        await it.send("c", options={"accept": "text/plain"})
        await it.engine.begun("a", "b", "c")
        headers = {body: request.headers for body, request in it.engine.requests.items()}
        assert headers == {
            "a": {"Content-Type": "text/csv", "X-Amzn-SageMaker-Custom-Attributes": "k=v"},
            "b": None,
            "c": {"Accept": "text/plain"},
        }


@virtually
async def test_headers_of_the_engine_go_with_the_last_message() -> None:
    async with bench(Talker(), stream_interval_ms=0) as it:
        engine = await streaming_bench(it, "a")
        engine.say("a", 1)
        await it.responses_until(1)
        engine.end("a", WithHeaders(2, {"X-Own": "yes"}))
        got = await it.responses_until(2)
        assert "headers" not in got[0]
        assert (got[1]["body"], got[1]["headers"]) == (2, {"X-Own": "yes"})


@virtually
async def test_the_slot_is_free_before_the_last_chunks_are_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(Talker(1), start=False) as it, flaky(it, monkeypatch) as (_, topic):
        it.start()
        engine = await streaming_bench(it, "a")
        topic.hang.add("publish")
        engine.say("a", 1)
        await until(lambda: topic.under_way)
        await it.send("b", options=STREAM)
        engine.end("a", 2)
        await engine.begun("b")
        topic.hang.clear()
        engine.end("b", 3)
        got = await it.responses_until(3)
        assert sorted(places(got)) == [(1, 0, False), (2, 1, True), (3, 0, True)]
        await until_empty(it)


async def test_a_stream_is_never_an_output_object_and_its_answer_is_in_the_ledger(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"blobs": f"file://{tmp_path}", "ledger": f"file://{tmp_path}/ledger"}
    async with bench(Talker(), stream_interval_ms=0, max_inline_bytes=10, **settings) as it:
        options = {**STREAM, "inference_id": "one"}
        engine = await streaming_bench(it, "a", options=options)
        engine.say("a", "a chunk of more than ten bytes")
        engine.end("a", "an end of more than ten bytes")
        got = await answered(it, 2)
        assert [name for name in files(tmp_path) if "outputs" in name] == []
        await it.send("a", {"n": 2}, options=options)
        got = await answered(it, 3)
        assert engine.started == ["a"]
        assert got[2] == {**got[1], "metadata": {"n": 2}}, "as it was: the attempt's number says which stream it ends"
        assert it.got[2][1].attributes["response_id"] == "one"


@pytest.mark.parametrize(
    ("key", "inference_id", "expected"),
    [(None, "mine", "mine"), (None, "two words", None), ("group", "mine", "group"), (None, None, "response_id")],
)
@virtually
async def test_all_messages_of_a_stream_have_one_ordering_key(
    key: str | None, inference_id: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, sent = GroupQueue(), list[Outgoing]()
    async with bench(Talker(), start=False, stream_interval_ms=0) as it, flaky(it, monkeypatch) as (_, topic):
        monkeypatch.setattr("rejoinder.worker.service.open_subscription", opener(queue))
        it.start()
        await until(lambda: topic.inner is not None)
        monkeypatch.setattr(topic.inner, "publish", noting(topic.inner.publish, sent))
        options = {**STREAM, **({} if inference_id is None else {"inference_id": inference_id})}
        body = json.dumps({"path": "/run", "metadata": {}, "body": "a", "options": options}).encode()
        queue.send(key, body)
        engine: Talker = it.engine
        await engine.begun("a")
        for n in range(3):
            engine.say("a", n)
            await it.responses_until(n + 1)
        engine.end("a")
        await it.responses_until(4)
        await until(lambda: not queue.left)
        keys = {one.ordering_key for one in sent}
        assert len(keys) == 1
        assert None not in keys
        if expected is not None:
            assert keys == {sent[0].attributes["response_id"] if expected == "response_id" else expected}
        assert len({one.deduplication_id for one in sent}) == 4
        assert all(one.deduplication_id and len(one.deduplication_id) <= 128 for one in sent)
        assert len({json.dumps(dict(one.attributes)) for one in sent}) == 1


def noting(publish: Any, sent: list[Outgoing]) -> Any:
    async def note(batch: Sequence[Outgoing]) -> Any:
        sent.extend(batch)
        return await publish(batch)

    return note


@virtually
async def test_streams_share_the_broker_s_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = [f"r{n}" for n in range(50)]
    async with bench(Talker(50), start=False) as it, flaky(it, monkeypatch) as (_, topic):
        it.start()
        engine = await streaming_bench(it, *bodies)
        for body in bodies:
            engine.say(body, body)
        got = await it.responses_until(50)
        assert sorted(one["body"] for one in got) == sorted(bodies)
        assert topic.calls.count("publish") <= 2
        for body in bodies:
            engine.end(body)
        await it.responses_until(100)
        await until_empty(it)
