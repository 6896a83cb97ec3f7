"""Cancel marks: what is held and marked ends with 499 wherever it is, and nothing else is touched."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cancel_harness import is_cancelled, mark, marks, until_unmarked
from group_queue import GroupQueue, opener
from store_harness import files
from virtual_time import virtually
from worker_harness import LIMIT, Bench, GateEngine, bench, flaky, until, until_empty

from rejoinder.adapters import open_blobs
from rejoinder.adapters.cancel_marks import mark_name
from rejoinder.adapters.file_store import FileStore
from rejoinder.adapters.memory import fresh_url
from rejoinder.worker.errors import Unavailable


@pytest.mark.parametrize("by", ["message id", "inference id", "an inference id that is no name of a file"])
@virtually
async def test_a_running_request_is_stopped_and_answered(by: str) -> None:
    metadata = {"n": 12345678901234567890, "z": 1, "a": [None]}
    async with bench(GateEngine(capacity=4)) as it:
        other = await it.send("other", {"n": 2})
        ids = {"inference id": "doc-17", "an inference id that is no name of a file": "../doc:17~"}
        message_id = await it.send("long", metadata, options={"inference_id": ids[by]} if by in ids else {})
        await until(lambda: len(it.engine.running) == 2)
        await mark(it, ids.get(by, message_id))
        (response,) = await it.responses_until(1)
        assert is_cancelled(response, metadata)
        attributes = it.got[0][1].attributes
        assert attributes["request_message_id"] == message_id
        assert by == "message id" or attributes["response_id"] == ids[by]
        assert it.engine.cancelled == ["long"]
        await until_unmarked(it)
        it.engine.release("other")
        responses = await it.responses_until(2)
        assert responses[1]["status_code"] == 200
        assert it.got[1][1].attributes["request_message_id"] == other
        await until_empty(it)
        await it.stop()


@virtually
async def test_what_waits_for_a_slot_is_answered_without_one() -> None:
    async with bench(GateEngine(capacity=1), prefetch=4) as it:
        await it.send("first")
        await until(lambda: it.engine.started)
        ids = [await it.send(f"waits {number}", {"n": number}) for number in range(3)]
        await mark(it, ids[1])
        (response,) = await it.responses_until(1)
        assert is_cancelled(response, {"n": 1})
        it.engine.open = True
        it.engine.release("first")
        await it.responses_until(4)
        assert sorted(it.engine.started) == ["first", "waits 0", "waits 2"]
        await until_unmarked(it)


@virtually
async def test_what_was_marked_before_it_came_does_not_go_on() -> None:
    async with bench(start=False) as it:
        ids = [await it.send(f"r{number}", {"n": number}) for number in range(20)]
        await mark(it, *ids)
        it.start()
        responses = await it.responses_until(20)
        assert all(response["status_code"] == 499 for response in responses)
        assert sorted(response["metadata"]["n"] for response in responses) == list(range(20))
        # The first ones begin before the first listing is there; what comes after it does not.
        assert len(it.engine.started) < 20
        assert sorted(it.engine.cancelled) == sorted(it.engine.started)
        await until_unmarked(it)


@virtually
async def test_a_mark_that_comes_late_changes_nothing_and_goes() -> None:
    async with bench(request_options="?lease=5") as it:
        message_id = await it.send("quick")
        await it.send("long")
        await until(lambda: len(it.engine.running) == 2)
        it.engine.release("quick")
        assert (await it.responses_until(1))[0]["status_code"] == 200
        await mark(it, message_id)
        it.engine.release("long")
        assert [one["status_code"] for one in await it.responses_until(2)] == [200, 200]
        assert it.engine.cancelled == []


@virtually
async def test_a_request_whose_answer_is_on_its_way_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(start=False) as it, flaky(it, monkeypatch) as (_, topic):
        it.start()
        topic.hang.add("publish")
        message_id = await it.send("r")
        await it.send("long")
        await until(lambda: len(it.engine.running) == 2)
        it.engine.release("r")
        await until(lambda: topic.under_way)
        await mark(it, message_id)
        await _seen(it)
        topic.hang.clear()
        await it.responses_until(2)
        statuses = {one.attributes["request_message_id"]: answer["status_code"] for answer, one in it.got}
        assert statuses.pop(message_id) == 200
        assert list(statuses.values()) == [499]
        await until_gone(it, message_id)
        it.engine.release("long")
        await it.responses_until(3)


async def _seen(it: Bench) -> None:
    """Wait until a listing is over that finds all marks that there are now: by what one more does."""
    probe = await it.send("probe", {"n": 3})
    await until(lambda: "probe" in it.engine.started)
    await mark(it, probe)
    await until(lambda: "probe" in it.engine.cancelled)


async def until_gone(it: Bench, request_id: str) -> None:
    deadline = time.monotonic() + LIMIT
    while mark_name(request_id) in await marks(it):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@virtually
async def test_the_mark_stays_until_the_ack_is_through(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(start=False) as it, flaky(it, monkeypatch) as (subscription, _):
        it.start()
        message_id = await it.send("r")
        await until(lambda: it.engine.started)
        subscription.hang.add("ack")
        await mark(it, message_id)
        assert (await it.responses_until(1))[0]["status_code"] == 499
        await until(lambda: "ack" in subscription.calls)
        assert await marks(it) == {mark_name(message_id)}
        subscription.hang.clear()
        await until_unmarked(it)


@virtually
async def test_requests_that_share_an_inference_id_are_all_cancelled() -> None:
    async with bench(GateEngine(capacity=8)) as it:
        for number in range(3):
            await it.send(f"shared {number}", {"n": number}, options={"inference_id": "both"})
        await it.send("other", options={"inference_id": "other"})
        await until(lambda: len(it.engine.running) == 4)
        await mark(it, "both")
        responses = await it.responses_until(3)
        assert all(response["status_code"] == 499 for response in responses)
        assert sorted(response["metadata"]["n"] for response in responses) == [0, 1, 2]
        await until_unmarked(it)
        assert list(it.engine.running) == ['"other"']


@virtually
async def test_a_retry_that_is_delayed_is_answered_when_it_comes() -> None:
    engine = GateEngine()
    engine.open = True
    engine.errors["fails"] = [Unavailable("again") for _ in range(100)]
    async with bench(engine, retry_delay_seconds=1.5, retry_delay_max_seconds=1.5, max_attempts=50) as it:
        message_id = await it.send("fails")
        await until(lambda: engine.started and not engine.running)
        engine.errors["fails"] = []
        engine.open = False
        await mark(it, message_id)
        (response,) = await it.responses_until(1)
        assert is_cancelled(response, {"n": 1})
        assert it.got[0][1].attributes["attempt"] == "2"
        await until_unmarked(it)


@virtually
async def test_what_waits_for_its_turn_is_answered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = GroupQueue()
    queue.hold_back = False
    monkeypatch.setattr("rejoinder.worker.service.open_subscription", opener(queue))
    async with bench(GateEngine(capacity=4)) as it:
        for number in range(4):
            body = {"path": "/run", "metadata": {"n": number}, "body": f"a{number}"}
            queue.send("a", json.dumps({**body, "options": {"inference_id": f"id-{number}"}}).encode())
        await until(lambda: it.engine.started == ["a0"])
        await mark(it, "id-1", "id-2")
        probe = await _probe_free(it, queue)
        assert it.engine.started == ["a0", probe], "none is answered before its turn"
        it.engine.release("a0")
        await until(lambda: "a3" in it.engine.started)
        it.engine.release("a3")
        responses = await it.responses_until(5)
        of_key = [(one["metadata"]["n"], one["status_code"]) for one in responses if one["metadata"]["n"] < 4]
        assert of_key == [(0, 200), (1, 499), (2, 499), (3, 200)]
        await until(lambda: not queue.left)
        acked = [event.number for event in queue.events if event.what == "acked"]
        assert [number for number in acked if number < 4] == [0, 1, 2, 3]
        # Each began when its turn had come, and had no time to run.
        assert not {"a1", "a2"} & set(it.engine.started)


async def _probe_free(it: Bench, queue: GroupQueue) -> str:
    """Send and cancel one without a key, so that the marks before it have been seen."""
    body = {"path": "/run", "metadata": {"n": 9}, "body": "probe", "options": {"inference_id": "probe"}}
    queue.send(None, json.dumps(body).encode())
    await until(lambda: "probe" in it.engine.started)
    await mark(it, "probe")
    await until(lambda: "probe" in it.engine.cancelled)
    return "probe"


async def test_the_reading_of_an_input_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = asyncio.Event()

    class Endless(FileStore):
        @contextlib.asynccontextmanager
        async def read(self, key: str) -> AsyncIterator[Any]:
            async with super().read(key) as blob:
                if key == "in.json":
                    reading.set()
                    await asyncio.Event().wait()
                yield blob

    @contextlib.asynccontextmanager
    async def opened(url: str) -> AsyncIterator[Any]:
        yield Endless(url.removeprefix("file://"))

    (tmp_path / "in.json").write_text("1")
    monkeypatch.setattr("rejoinder.worker.stores.open_blobs", opened)
    async with bench(blobs=f"file://{tmp_path}", cancels=f"file://{tmp_path}/cancels") as it:
        location = f"file://{tmp_path}/in.json"
        envelope = {"path": "/run", "metadata": {"n": 7}, "input_location": location}
        message_id = await it.send_raw(json.dumps(envelope).encode())
        await reading.wait()
        await mark(it, message_id)
        (response,) = await it.responses_until(1)
        assert is_cancelled(response, {"n": 7})
        assert response["failure_location"].endswith(".json")
        assert it.engine.started == []
        await until_unmarked(it)


async def test_a_job_of_lines_ends_and_leaves_no_output(tmp_path: Path) -> None:
    async with bench(GateEngine(capacity=2), blobs=f"file://{tmp_path}", ledger=f"file://{tmp_path}/ledger") as it:
        (tmp_path / "in.jsonl").write_bytes(b"".join(b"%d\n" % number for number in range(50)))
        envelope = {"path": "/run", "metadata": {"n": 7}, "input_location": f"file://{tmp_path}/in.jsonl"}
        message_id = await it.send_raw(json.dumps(envelope).encode())
        await until(lambda: len(it.engine.running) == 2)
        it.engine.release(0)
        await until(lambda: len(it.engine.started) == 3)
        await mark(it, message_id)
        (response,) = await it.responses_until(1)
        assert is_cancelled(response, {"n": 7})
        assert it.engine.running == {}
        await until_unmarked(it)
        name = it.got[0][1].attributes["response_id"]
        assert files(tmp_path) == [f"failures/{name}.json", "in.jsonl", f"ledger/{name}.json"]
        assert json.loads((tmp_path / "ledger" / f"{name}.json").read_text())["status_code"] == 499


@virtually
async def test_every_part_of_a_message_is_answered() -> None:
    settings = {"s3_event_path": "/run", "allow_input": "s3://bucket/in"}
    records = [
        {
            "eventVersion": "2.1",
            "eventSource": "aws:s3",
            "eventName": "ObjectCreated:Put",
            "s3": {"bucket": {"name": "bucket"}, "object": {"key": f"in/k{number}", "size": 3}},
        }
        for number in range(3)
    ]
    objects = {f"k{number}": f'"part {number}"'.encode() for number in range(3)}

    class Bucket:
        url = "s3://bucket/in"

        def location(self, key: str) -> str:
            return f"{self.url}/{key}"

        @contextlib.asynccontextmanager
        async def read(self, key: str) -> AsyncIterator[Any]:
            async with open_blobs(fresh_url()) as store:
                await store.put("k", _one(objects[key]), "application/json")
                async with store.read("k") as blob:
                    yield blob

    @contextlib.asynccontextmanager
    async def opened(url: str) -> AsyncIterator[Any]:
        if url.startswith("memory://"):
            async with open_blobs(url) as store:
                yield store
        else:
            yield Bucket()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rejoinder.worker.stores.open_blobs", opened)
        async with bench(GateEngine(capacity=2), **settings) as it:
            message_id = await it.send_raw(json.dumps({"Records": records}).encode())
            await until(lambda: len(it.engine.running) == 2)
            it.engine.release("part 0")
            await until(lambda: len(it.engine.started) == 3)
            await mark(it, message_id)
            responses = await it.responses_until(3)
            by_key = {response["metadata"]["key"]: response["status_code"] for response in responses}
            assert by_key == {"in/k0": 200, "in/k1": 499, "in/k2": 499}
            await until_unmarked(it)


async def _one(content: bytes) -> AsyncIterator[bytes]:
    yield content
