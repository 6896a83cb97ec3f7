"""Stores that are away, refuse, or answer when it is too late: nothing is lost, and nothing is stored beside it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from store_harness import answered, files, flaky_stores
from worker_harness import LIMIT, GateEngine, bench, flaky, until, until_backlog

from rejoinder.adapters import AdapterError, Denied, NotFound, TooLarge, Transient, open_blobs
from rejoinder.adapters.memory import fresh_url
from rejoinder.schemas.envelope import Beside, write_response
from rejoinder.worker.errors import BadRequest

LARGE = "x" * 5000


def opened(**settings: Any) -> Any:
    engine = GateEngine()
    engine.open = True
    return bench(engine, max_inline_bytes=1000, **settings)


async def test_a_store_that_is_away_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with (
        flaky_stores(monkeypatch) as stores,
        opened(blobs=f"file://{tmp_path}", request_options="?lease=2") as it,
    ):
        await it.send("first")
        await it.responses_until(1)
        stores["outputs"].fail["put"] = [Transient("away")] * 10_000
        await it.send(LARGE)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await until(lambda: loop.time() > began + 3.0)  # longer than a lease
        failed = 10_000 - len(stores["outputs"].fail.pop("put"))
        _, response = await answered(it, 2)
        assert response["output_location"]
        assert it.engine.started == ["first", LARGE], "the result waits; it is not made again"
        assert stores["outputs"].calls.count("put") == failed + 1 > 3
        assert it.got[1][1].attributes["attempt"] == "1", "its lease is kept meanwhile"


@pytest.mark.parametrize("call", ["exists", "put"])
async def test_a_store_that_never_returns_does_not_keep_the_worker_from_stopping(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    async with flaky_stores(monkeypatch) as stores, opened(blobs=f"file://{tmp_path}", grace_seconds=0.2) as it:
        await it.send("first")
        await it.responses_until(1)
        stores["outputs"].hang.add(call)
        await it.send(LARGE, options={"inference_id": "i"})
        await until(lambda: stores["outputs"].calls[-1:] == [call])
        await it.stop()
        await until_backlog(it, lambda backlog: backlog.waiting == 1)
        assert files(tmp_path) == []


async def test_results_that_wait_for_their_store_hold_up_receiving(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("rejoinder.worker.consumer.MAX_HELD_BYTES", 20_000)
    async with flaky_stores(monkeypatch) as stores, opened(blobs=f"file://{tmp_path}") as it:
        await it.send("first")
        await answered(it)
        stores["outputs"].hang.add("put")
        for _ in range(40):
            await it.send(LARGE)
        await until(lambda: stores["outputs"].calls.count("put") >= 2)
        await asyncio.sleep(0.3)  # for more, if more were taken
        assert stores["outputs"].calls.count("put") < 12
        stores["outputs"].hang.clear()
        await answered(it, 41)


@pytest.mark.parametrize("error", [Denied("no s3:PutObject"), NotFound("no such bucket")])
@pytest.mark.parametrize("which", ["outputs", "failures", "ledger"])
async def test_a_store_that_refuses_ends_the_worker_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, which: str, error: AdapterError
) -> None:
    body = "bad" if which == "failures" else LARGE
    async with (
        flaky_stores(monkeypatch) as stores,
        opened(blobs=f"file://{tmp_path}", ledger=f"file://{tmp_path}/ledger") as it,
    ):
        it.engine.errors = {"bad": [BadRequest("no")] * 2}
        await until(lambda: which in stores and stores[which].calls)
        stores[which].fail["put"] = [error]
        await it.send(body)
        assert it.task is not None
        with pytest.raises(type(error), match=str(error)):
            await asyncio.wait_for(it.task, LIMIT)
        await until_backlog(it, lambda backlog: backlog.waiting == 1)
        it.start()
        await answered(it)


@pytest.mark.parametrize("which", ["outputs", "failures", "ledger"])
@pytest.mark.parametrize("error", [Denied("no s3:ListBucket"), NotFound("no such bucket")])
async def test_a_store_that_refuses_at_the_start_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, which: str, error: AdapterError
) -> None:
    async with (
        flaky_stores(monkeypatch) as stores,
        opened(blobs=f"file://{tmp_path}", ledger=f"file://{tmp_path}/ledger", start=False) as it,
    ):
        it.start()
        await until(lambda: which in stores)
        await it.stop()
        stores[which].fail["exists"] = [error]
        it.signals = type(it.signals)()
        it.start()
        assert it.task is not None
        with pytest.raises(type(error), match=str(error)):
            await asyncio.wait_for(it.task, LIMIT)


@pytest.mark.parametrize("options", [{"output_path_extension": "taken"}, {"output_path_extension": ".rejoinder-put-x"}])
async def test_a_place_of_the_senders_that_the_store_refuses_is_that_requests_failure(
    tmp_path: Path, options: dict[str, str]
) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/taken").write_text("a file, where the key needs a directory")
    async with opened(blobs=f"file://{tmp_path}") as it:
        await it.send("x", options={**options, "inference_id": "r"})
        (response,) = await answered(it)
        assert (response["status_code"], response["body"]["error"]["param"]) == (403, "options.output_path_extension")
        await it.send(LARGE)
        assert (await answered(it, 2))[1]["output_location"], "the worker goes on"


async def test_what_the_store_finds_too_large_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with flaky_stores(monkeypatch) as stores, opened(blobs=f"file://{tmp_path}") as it:
        await until(lambda: stores.get("outputs") is not None and stores["outputs"].calls)
        stores["outputs"].fail["put"] = [TooLarge("5 TB are allowed")]
        await it.send(LARGE, options={"inference_id": "t"})
        (response,) = await answered(it)
        assert response["body"]["error"]["code"] == "response_too_large"
        assert files(tmp_path) == ["failures/t.json"]


async def test_no_result_is_stored_beside_a_failure(tmp_path: Path) -> None:
    """Another delivery has failed while this one ran, as where a broker delivers twice at once."""
    failure = f"file://{tmp_path}/failures/r.json"
    wire = write_response(400, '{"n": 1}', {"error": {"message": "of the other"}}, Beside(failure_location=failure))
    async with bench(GateEngine(), blobs=f"file://{tmp_path}", max_inline_bytes=1000) as it:
        await it.send(LARGE, options={"inference_id": "r"})
        await until(lambda: it.engine.running)
        (tmp_path / "failures").mkdir()
        (tmp_path / "failures/r.json").write_bytes(wire)
        it.engine.release(LARGE)
        await answered(it)
        assert it.got[0][1].body == wire
        assert files(tmp_path) == ["failures/r.json"]


async def test_a_worker_that_slept_past_its_lease_asks_before_it_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, blobs = GateEngine(), fresh_url()
    async with (
        bench(engine, blobs=blobs, max_inline_bytes=1000, request_options="?lease=0.3", prefetch=0, start=False) as it,
        flaky(it, monkeypatch) as (subscription, _),
    ):
        subscription.hang.add("set_lease")  # as if the process had been suspended: no renewal, no news
        await it.send(LARGE, options={"inference_id": "r"})
        it.start()
        await until(lambda: engine.running)
        subscription.hang.add("receive")
        (taken,) = await it.subscription.receive(1, LIMIT)
        assert await it.subscription.set_lease([taken], 600) == [None]
        subscription.hang.discard("set_lease")
        engine.release(LARGE)
        await until(lambda: not engine.running)
        await it.subscription.ack([taken])
        subscription.hang.clear()
        await it.stop()
        assert await it.response_subscription.receive(1, 0.1) == []
    async with open_blobs(f"{blobs}/outputs") as store:
        assert not await store.exists("r.out")


async def test_a_lease_that_is_lost_ends_the_upload(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with (
        flaky_stores(monkeypatch) as stores,
        opened(blobs=f"file://{tmp_path}", request_options="?lease=0.5", start=False) as it,
        flaky(it, monkeypatch) as (subscription, _),
    ):
        it.start()
        await until(lambda: "outputs" in stores and stores["outputs"].calls)
        stores["outputs"].hang.add("put")
        await it.send(LARGE)
        await until(lambda: stores["outputs"].calls[-1] == "put")
        subscription.hang.add("set_lease")
        (message,) = await it.subscription.receive(1, LIMIT)  # somebody else has it now
        assert await it.subscription.set_lease([message], 600) == [None]
        subscription.hang.clear()
        await until(lambda: not it.engine.running and not stores["outputs"].under_way)
        stores["outputs"].hang.clear()
        await it.subscription.ack([message])
        await it.stop()
        assert files(tmp_path) == []
        assert await it.response_subscription.receive(1, 0.1) == []
