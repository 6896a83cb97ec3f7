"""Cancel marks: what is held and marked ends with 499 wherever it is, and nothing else is touched."""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from group_queue import GroupQueue, opener
from store_harness import files, flaky_stores
from worker_harness import Bench, GateEngine, bench, flaky, until, until_empty

from rejoinder.adapters import Denied, Message, Outgoing, Transient, open_blobs, open_subscription, open_topic
from rejoinder.adapters.cancel_marks import mark_key, marks_url
from rejoinder.adapters.file_store import FileStore
from rejoinder.adapters.memory import fresh_url
from rejoinder.client.cancel import cancel, cancels_of
from rejoinder.schemas.envelope import Options
from rejoinder.worker import cancels as cancels_module
from rejoinder.worker.cancels import Cancels
from rejoinder.worker.errors import Unavailable
from rejoinder.worker.handler import Job
from rejoinder.worker.service import StopSignals, serve
from rejoinder.worker.settings import Settings


def url_of(it: Bench) -> str:
    settings = it.settings
    return cancels_of(requests=settings.requests, cancels=settings.cancels, blobs=settings.blobs)


async def mark(it: Bench, *ids: str) -> None:
    assert await cancel(url_of(it), ids) == len(ids)


async def marks(it: Bench) -> set[str]:
    async with open_blobs(url_of(it)) as store:
        return {one.key async for one in store.list()}


async def until_unmarked(it: Bench, limit: float = 20.0) -> None:
    deadline = time.monotonic() + limit
    while left := await marks(it):
        assert time.monotonic() < deadline, left
        await asyncio.sleep(0.02)


def is_cancelled(response: dict[str, Any], metadata: Any) -> bool:
    return bool(
        response["status_code"] == 499
        and response["metadata"] == metadata
        and response["body"]["error"]["type"] == "cancelled_error"
        and response["body"]["error"]["message"] == "the request was cancelled by its sender"
    )


@pytest.mark.parametrize("by", ["message id", "inference id", "an inference id that is no name of a file"])
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
    deadline = time.monotonic() + 20
    while mark_key(request_id) in await marks(it):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_the_mark_stays_until_the_ack_is_through(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(start=False) as it, flaky(it, monkeypatch) as (subscription, _):
        it.start()
        message_id = await it.send("r")
        await until(lambda: it.engine.started)
        subscription.hang.add("ack")
        await mark(it, message_id)
        assert (await it.responses_until(1))[0]["status_code"] == 499
        await until(lambda: "ack" in subscription.calls)
        assert await marks(it) == {mark_key(message_id)}
        subscription.hang.clear()
        await until_unmarked(it)


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
    async with bench(blobs=f"file://{tmp_path}") as it:
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


async def test_what_runs_out_its_grace_can_be_cancelled() -> None:
    async with bench(grace_seconds=60.0) as it:
        message_id = await it.send("long")
        await until(lambda: it.engine.started)
        it.signals.receive("SIGTERM")
        await mark(it, message_id)
        assert it.task is not None
        await asyncio.wait_for(it.task, 20)
        assert is_cancelled((await it.responses_until(1))[0], {"n": 1})
        assert await marks(it) == set()


@pytest.mark.parametrize(("error", "text"), [(Denied, "no s3:ListBucket"), (Transient, "away"), (RuntimeError, "")])
async def test_a_store_that_fails_is_told_once_and_stops_nothing(
    error: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancels_module, "EVERY", 0.01)
    monkeypatch.setattr(cancels_module, "DENIED_EVERY", 0.01)
    logger = structlog.testing.CapturingLogger()
    monkeypatch.setattr(cancels_module, "log", logger)
    broken, tries = [True], [0]

    async with flaky_stores(monkeypatch) as stores, bench() as it:
        await until(lambda: "cancels" in stores)
        inner = stores["cancels"].inner

        async def listing() -> Any:
            tries[0] += 1
            if broken[0]:
                raise error(text)
            async for one in inner.list():
                yield one

        stores["cancels"].list = listing
        message_id = await it.send("long")
        await it.send("other")
        await until(lambda: len(it.engine.running) == 2)
        await mark(it, message_id)
        await until(lambda: tries[0] > 5)
        it.engine.release("other")
        assert (await it.responses_until(1))[0]["status_code"] == 200
        broken[0] = False
        assert is_cancelled((await it.responses_until(2))[1], {"n": 1})
        assert [call.args[0] for call in logger.calls][:3] == [
            "cancel_marks_trouble",
            "cancel_marks_again",
            "requests_cancelled",
        ]
        assert logger.calls[0].kwargs["error_type"] == error.__name__
        assert logger.calls[0].kwargs.get("error", "") == text


async def test_marks_that_cannot_be_removed_harm_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = structlog.testing.CapturingLogger()
    monkeypatch.setattr(cancels_module, "log", logger)
    async with flaky_stores(monkeypatch) as stores, bench(GateEngine(capacity=8)) as it:
        await until(lambda: "cancels" in stores)
        stores["cancels"].fail["remove"] = [Denied("no s3:DeleteObject")] * 100
        ids = [await it.send(f"r{number}") for number in range(3)]
        await until(lambda: len(it.engine.running) == 3)
        await mark(it, *ids)
        assert [one["status_code"] for one in await it.responses_until(3)] == [499] * 3
        await it.send("other")
        await until(lambda: "other" in it.engine.started)
        it.engine.release("other")
        assert (await it.responses_until(4))[3]["status_code"] == 200
        await it.stop()
    assert [call.args[0] for call in logger.calls].count("cancel_marks_trouble") == 1


async def test_a_worker_without_a_store_of_marks_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rejoinder.worker.stores.marks_url", lambda *_: None)
    async with bench() as it:
        it.engine.open = True
        message_id = await it.send("r")
        await mark(it, message_id)
        assert (await it.responses_until(1))[0]["status_code"] == 200
        await it.stop()


async def test_nothing_is_listed_while_nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancels_module, "EVERY", 0.01)
    listings = [0]
    async with flaky_stores(monkeypatch) as stores, bench() as it:
        await until(lambda: "cancels" in stores)
        inner = stores["cancels"].inner

        def listing() -> Any:
            listings[0] += 1
            return inner.list()

        stores["cancels"].list = listing
        await it.send("r")
        await until(lambda: listings[0] > 3)
        it.engine.release("r")
        await it.responses_until(1)
        await asyncio.sleep(0.1)
        before = listings[0]
        await asyncio.sleep(0.3)
        assert listings[0] == before


async def test_many_marks_and_many_held() -> None:
    held = 1000
    async with bench(GateEngine(capacity=held), start=False) as it:
        await mark(it, *[f"nobody-{number}" for number in range(10_000)])
        bodies = [
            json.dumps(
                {
                    "path": "/run",
                    "metadata": {"n": number},
                    "body": number,
                    "options": {"inference_id": f"id-{number}"},
                }
            ).encode()
            for number in range(held)
        ]
        async with open_topic(it.requests) as topic:
            await topic.publish([Outgoing(body) for body in bodies])
        it.start()
        await until(lambda: len(it.engine.running) == held)
        await mark(it, *[f"id-{number}" for number in range(0, held, 2)])
        responses = await it.responses_until(held // 2, 60)
        assert {response["status_code"] for response in responses} == {499}
        assert sorted(response["metadata"]["n"] for response in responses) == list(range(0, held, 2))
        for number in range(1, held, 2):
            it.engine.release(number)
        responses = await it.responses_until(held, 60)
        assert sorted(one["metadata"]["n"] for one in responses if one["status_code"] == 200) == list(range(1, held, 2))
        await until_empty(it)
        await it.stop()
        assert len(await marks(it)) == 10_000


async def test_marks_whose_requests_will_not_come_are_removed(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/marks"
    async with bench(cancels=url) as it:
        await cancel(url, [f"old-{number}" for number in range(25)] + ["new"])
        for path in (tmp_path / "marks").glob("old-*"):
            os.utime(path, (time.time(), time.time() - 15 * 86_400 - 60))
        await it.send("r")
        await until(lambda: files(tmp_path) == ["marks/new"])
        it.engine.release("r")
        await it.responses_until(1)


async def test_a_mark_is_for_what_was_sent_before_it(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/marks"
    async with bench(GateEngine(capacity=8), cancels=url) as it:
        await cancel(url, ["again"])
        os.utime(tmp_path / "marks" / "again", (time.time(), time.time() - 3600))
        await it.send("resent", options={"inference_id": "again"})
        probe = await it.send("probe")
        await until(lambda: len(it.engine.running) == 2)
        await cancel(url, [probe])
        await until(lambda: it.engine.cancelled == ["probe"])
        assert list(it.engine.running) == ['"resent"']
        await cancel(url, ["again"])  # which renews what stands
        await until(lambda: it.engine.cancelled == ["probe", "resent"])
        assert [one["status_code"] for one in await it.responses_until(2)] == [499, 499]


async def test_a_limit_that_runs_out_with_the_mark_and_a_lost_lease_are_told_apart() -> None:
    async with open_blobs(fresh_url()) as store:
        cancels = Cancels(store)
        message = Message("1", b"", {}, 1, None, None)
        job = Job("/run", None, "r", 0, 1, "{}", Options(inference_id="id"))

        async def held() -> None:
            with cancels.stop(message, job):
                await asyncio.Event().wait()

        task = asyncio.create_task(held())
        await asyncio.sleep(0)
        (stop,) = cancels._running
        stop.expire()
        task.cancel()  # as a lost lease does, in the same turn
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cancels._running == {}


async def test_notices_call_it_failed() -> None:
    errors = fresh_url()
    async with open_subscription(errors) as told, bench(error_topic=errors) as it:
        message_id = await it.send("r")
        await until(lambda: it.engine.started)
        await mark(it, message_id)
        await it.responses_until(1)
        (notice,) = await told.receive(1, 10)
        body = json.loads(notice.body)
        assert body["invocationStatus"] == "Failed"
        assert "cancelled" in body["failureReason"]


async def test_it_is_answered_from_what_is_stored_after_the_mark_is_gone(tmp_path: Path) -> None:
    """As after a kill between the mark's removal and an ack that did not arrive after all."""
    requests = f"sqlite:///{tmp_path}/q.db?queue=r"
    signals, engine = StopSignals(), GateEngine()
    settings = Settings(
        requests=requests,
        responses=f"sqlite:///{tmp_path}/q.db?queue=s",
        engine="echo",
        ledger=f"file://{tmp_path}/ledger",
    )
    assert marks_url(settings.requests, settings.cancels, settings.blobs) == f"file://{tmp_path}/q.db.cancels/"
    body = {"path": "/run", "metadata": {"n": 1}, "body": "r", "options": {"inference_id": "one"}}
    async with open_topic(requests) as topic:
        await topic.publish([Outgoing(json.dumps(body).encode())])
        worker = asyncio.create_task(serve(settings, signals, engine))
        await until(lambda: engine.started)
        await cancel(cancels_of(requests=requests), ["one"])
        await until((tmp_path / "ledger" / "one.json").exists)
        await until(lambda: files(tmp_path / "q.db.cancels") == [])
        await topic.publish([Outgoing(json.dumps({**body, "metadata": {"n": 2}}).encode())])
        async with contextlib.AsyncExitStack() as stack:
            answers = await stack.enter_async_context(open_subscription(settings.responses))
            got: list[Any] = []
            while len(got) < 2:
                got += await answers.receive(2, 10)
        assert [json.loads(one.body)["status_code"] for one in got] == [499, 499]
        assert [json.loads(one.body)["metadata"] for one in got] == [{"n": 1}, {"n": 2}]
        assert len(engine.started) == 1
        signals.receive("SIGTERM")
        await asyncio.wait_for(worker, 20)
