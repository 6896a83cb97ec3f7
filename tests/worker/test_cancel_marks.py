"""The store of marks: away, denied, full of marks, old ones; and what a worker makes of them when it stops."""

import asyncio
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import structlog
from cancel_harness import is_cancelled, mark, marks
from store_harness import files, flaky_stores
from virtual_time import virtually
from worker_harness import GateEngine, bench, until, until_empty

from rejoinder.adapters import Denied, Message, Outgoing, Transient, open_blobs, open_subscription, open_topic
from rejoinder.adapters.cancel_marks import mark_name, marks_url, name_of
from rejoinder.adapters.memory import fresh_url
from rejoinder.client.cancel import cancel, cancels_of
from rejoinder.schemas.envelope import Options
from rejoinder.worker import cancels as cancels_module
from rejoinder.worker import marks as marks_module
from rejoinder.worker.cancels import Cancels
from rejoinder.worker.errors import Cancelled
from rejoinder.worker.handler import Answer, Job
from rejoinder.worker.service import StopSignals, serve
from rejoinder.worker.settings import Settings


@virtually
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
@virtually
async def test_a_store_that_fails_is_told_once_and_stops_nothing(
    error: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks_module, "EVERY", 0.01)
    monkeypatch.setattr(marks_module, "DENIED_EVERY", 0.01)
    logger = structlog.testing.CapturingLogger()
    monkeypatch.setattr(cancels_module, "log", logger)
    monkeypatch.setattr(marks_module, "log", logger)
    broken, tries = [True], [0]

    async with flaky_stores(monkeypatch) as stores, bench() as it:
        await until(lambda: "cancels" in stores)
        inner = stores["cancels"].inner

        async def listing(after: str = "") -> Any:
            tries[0] += 1
            if broken[0]:
                raise error(text)
            async for one in inner.list(after):
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
        await until(lambda: len(logger.calls) == 5)
        for call in ("list", "list all"):
            of_it = [one for one in logger.calls if one.kwargs.get("call") == call]
            assert [one.args[0] for one in of_it] == ["cancel_marks_trouble", "cancel_marks_again"]
            assert of_it[0].kwargs["error_type"] == error.__name__
            assert of_it[0].kwargs.get("error", "") == text
        assert [one.args[0] for one in logger.calls].count("requests_cancelled") == 1


@virtually
async def test_marks_that_cannot_be_removed_harm_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = structlog.testing.CapturingLogger()
    monkeypatch.setattr(cancels_module, "log", logger)
    monkeypatch.setattr(marks_module, "log", logger)
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


@virtually
async def test_a_worker_without_a_store_of_marks_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rejoinder.worker.stores.marks_url", lambda *_: None)
    async with bench() as it:
        it.engine.open = True
        message_id = await it.send("r")
        await mark(it, message_id)
        assert (await it.responses_until(1))[0]["status_code"] == 200
        await it.stop()


@virtually
async def test_nothing_is_listed_while_nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks_module, "EVERY", 0.01)
    listings = [0]
    async with flaky_stores(monkeypatch) as stores, bench() as it:
        await until(lambda: "cancels" in stores)
        inner = stores["cancels"].inner

        def listing(after: str = "") -> Any:
            listings[0] += 1
            return inner.list(after)

        stores["cancels"].list = listing
        await it.send("r")
        await until(lambda: listings[0] > 3)
        it.engine.release("r")
        await it.responses_until(1)
        await until_empty(it)
        await asyncio.sleep(0.1)
        before = listings[0]
        await asyncio.sleep(0.3)
        assert listings[0] == before


@virtually
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
        (tmp_path / "marks" / "README").write_text("not a mark")
        (tmp_path / "marks" / "1700000000000-no mark").write_text("nor this")
        for path in (tmp_path / "marks").iterdir():
            os.utime(path, (time.time(), time.time() - 32 * 86_400 - 60))
        # Pub/Sub may deliver what was sent 31 days ago.
        (new,) = (tmp_path / "marks").glob("*-new")
        os.utime(new, (time.time(), time.time() - 31 * 86_400))
        await it.send("r")
        await until(lambda: files(tmp_path) == ["marks/1700000000000-no mark", f"marks/{new.name}", "marks/README"])
        it.engine.release("r")
        await it.responses_until(1)


async def test_a_mark_of_a_message_id_is_for_it_whatever_the_clocks_say(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/marks"
    async with bench(cancels=url, start=False) as it:
        name = await it.send("r")
        await cancel(url, [name])
        (path,) = (tmp_path / "marks").glob(f"*-{mark_name(name)}")
        os.utime(path, (time.time(), time.time() - 3600))
        it.start()
        (response,) = await it.responses_until(1)
        assert response["status_code"] == 499
        await until(lambda: files(tmp_path) == [])


async def test_a_mark_is_for_what_was_sent_before_it(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/marks"
    async with bench(GateEngine(capacity=8), cancels=url) as it:
        await cancel(url, ["again"])
        (path,) = (tmp_path / "marks").iterdir()
        os.utime(path, (time.time(), time.time() - 3600))
        await it.send("resent", options={"inference_id": "again"})
        probe = await it.send("probe")
        await until(lambda: len(it.engine.running) == 2)
        await cancel(url, [probe])
        await until(lambda: it.engine.cancelled == ["probe"])
        assert list(it.engine.running) == ['"resent"']
        await cancel(url, ["again"])
        await until(lambda: it.engine.cancelled == ["probe", "resent"])
        assert [one["status_code"] for one in await it.responses_until(2)] == [499, 499]
        await until(lambda: files(tmp_path) == [])


@virtually
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


@virtually
async def test_an_attempt_that_fails_before_a_listing_ends_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the only one held: nothing is held any more when the listing brings its mark, nor until it comes again."""
    monkeypatch.setattr(marks_module, "EVERY", 0.01)
    async with open_blobs(url := fresh_url()) as store:
        cancels = Cancels(store)
        message = Message("1", b"", {}, 1, time.time(), None)
        job = Job("/run", None, "r", 0, 1, "{}", Options(inference_id="id"))
        await cancel(url, ["id"])
        watch = asyncio.create_task(cancels.run())
        with cancels.stop(message, job):
            pass
        await until(lambda: cancels.marks.paused)
        with pytest.raises(Cancelled), cancels.stop(message, job):
            pass
        untold = Message("2", b"", {}, 1, None, None)  # perhaps a later one: its broker does not say when it was sent
        with cancels.stop(untold, job):
            pass
        watch.cancel()


@virtually
async def test_a_mark_that_is_found_after_the_answer_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a worker is killed before its ack, and the next one finds the stored answer before it finds the mark."""
    monkeypatch.setattr(cancels_module, "LINGER", 0.5)
    async with open_blobs(url := fresh_url()) as store:
        cancels = Cancels(store)
        message = Message("1", b"", {}, 1, time.time(), None)
        job = Job("/run", None, "r", 0, 1, "{}", Options(inference_id="id"))
        await cancel(url, ["1", "id", "other"])
        cancels.settled(message, Answer(499, "{}", None, "r"), job)
        await cancels.marks.look()
        await until(lambda: not cancels.marks._removing)
        assert [name_of(one.key) async for one in store.list()] == ["other"]
        await cancels.close()


@virtually
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
