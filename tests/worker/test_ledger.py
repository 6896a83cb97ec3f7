"""The ledger: what was answered once is answered again, to the byte, and not run again."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from store_harness import answered, files, flaky_stores
from worker_harness import LIMIT, Bench, Flaky, GateEngine, bench, until, until_empty

from rejoinder.adapters import LeaseLost, Transient, open_subscription
from rejoinder.adapters.driver import Message, Subscription
from rejoinder.worker.errors import Failed
from rejoinder.worker.ledger import stored_answer
from rejoinder.worker.service import StopSignals, serve

RETRIES = {"max_attempts": 9, "retry_delay_seconds": 0.01}


class OwnEngine(GateEngine):
    """An engine whose results nobody else makes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    async def generate(self, request: Any) -> Any:
        return {**await super().generate(request), "by": self.name}


class View(Flaky):
    """A worker's own view of the request queue: it receives only when it is its turn."""

    inner: Subscription

    def __init__(self, inner: Subscription) -> None:
        super().__init__()
        self.inner = inner
        self.turn = False
        self.receiving = False
        self.unsettled: Sequence[Message] = ()

    async def ack(self, messages: Sequence[Message]) -> Any:
        if self.fail.get("ack"):
            self.unsettled = messages
        return await self.__getattr__("ack")(messages)

    async def lapse(self) -> None:
        """End the leases of what could not be acked, as if they had run out."""
        assert await self.inner.set_lease(self.unsettled, 0) == [None] * len(self.unsettled)

    async def receive(self, limit: int, wait: float) -> list[Message]:
        while not self.turn:
            await asyncio.sleep(0.005)
        self.receiving = True
        try:
            return await self.inner.receive(limit, min(wait, 0.05))
        finally:
            self.receiving = False


class Workers:
    """Several workers on one pair of queues, each with an engine and a view of the request queue of its own."""

    def __init__(self, it: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.it = it
        self.views: list[View] = []
        self.engines: list[OwnEngine] = []
        self.signals: list[StopSignals] = []
        self.tasks: list[asyncio.Task[None]] = []
        monkeypatch.setattr("rejoinder.worker.service.open_subscription", self._open)

    @contextlib.asynccontextmanager
    async def _open(self, url: str) -> AsyncIterator[Any]:
        async with open_subscription(url) as inner:
            self.views.append(View(inner))
            yield self.views[-1]

    async def start(self, count: int, *, gates_open: bool) -> None:
        for n in range(count):
            engine, signals = OwnEngine(f"worker {n}"), StopSignals()
            engine.open = gates_open
            self.engines.append(engine)
            self.signals.append(signals)
            self.tasks.append(asyncio.create_task(serve(self.it.settings, signals, engine)))
            await until(lambda n=n: len(self.views) > n)

    async def turn(self, turn: int | None) -> None:
        """Let this worker receive, and no other; None: nobody."""
        for n, view in enumerate(self.views):
            view.turn = n == turn
        await until(lambda: not any(view.receiving for view in self.views if not view.turn))

    async def stop(self) -> None:
        for view, signals in zip(self.views, self.signals, strict=True):
            view.hang.clear()
            view.turn = True
            signals.receive("SIGTERM")
        for task in self.tasks:
            await asyncio.wait_for(task, LIMIT)

    @property
    def runs(self) -> int:
        return sum(len(engine.started) for engine in self.engines)


@contextlib.asynccontextmanager
async def workers(
    monkeypatch: pytest.MonkeyPatch, count: int, lease: float, *, gates_open: bool, **settings: Any
) -> AsyncIterator[tuple[Bench, Workers]]:
    async with bench(request_options=f"?lease={lease:g}", start=False, **settings) as it:
        them = Workers(it, monkeypatch)
        await them.start(count, gates_open=gates_open)
        try:
            yield it, them
        finally:
            await them.stop()


@pytest.mark.parametrize("body", ["small", "x" * 5000])
async def test_five_deliveries_to_three_workers_are_one_inference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str
) -> None:
    settings = {"ledger": f"file://{tmp_path}/ledger", "blobs": f"file://{tmp_path}", "max_inline_bytes": 1000}
    async with workers(monkeypatch, 3, 30, gates_open=True, **settings) as (it, them):
        await it.send(body, {"n": 2**70})
        for delivery in range(5):
            turn = delivery % 3
            if delivery < 4:
                them.views[turn].fail["ack"] = [LeaseLost("the ack was lost")]
            await them.turn(turn)
            await it.responses_until(delivery + 1)
            await until(lambda: not any(view.fail.get("ack") for view in them.views))
            await them.turn(None)
            if delivery < 4:
                await them.views[turn].lapse()
        await until_empty(it)
        attempts = [message.attributes["attempt"] for _, message in it.got]
        assert attempts == ["1", "2", "3", "4", "5"]
        assert len({message.body for _, message in it.got}) == 1
        assert it.got[0][0]["metadata"] == {"n": 2**70}
        assert them.runs == 1


async def test_two_workers_with_different_results_publish_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first worker's lease ends unseen while it runs; both come to an answer, and whoever is first decides."""
    async with workers(monkeypatch, 2, 2, gates_open=False, ledger=f"file://{tmp_path}") as (it, them):
        await them.turn(0)
        await it.send("race")
        await until(lambda: them.engines[0].running)
        them.views[0].hang.add("set_lease")  # a network that is gone, as far as this worker can tell
        await them.turn(1)
        await until(lambda: them.engines[1].running)
        them.engines[0].release("race")
        them.engines[1].release("race")
        await it.responses_until(2)
        await until_empty(it)
        assert them.runs == 2
        assert len({message.body for _, message in it.got}) == 1
        (name,) = files(tmp_path)
        assert (tmp_path / name).read_bytes() == it.got[0][1].body


async def test_an_inference_id_is_run_once_and_each_sender_gets_its_own_metadata_back(tmp_path: Path) -> None:
    async with opened(ledger=f"file://{tmp_path}") as it:
        for n, body in enumerate(["first", "second"], 1):
            await it.send(body, {"n": n, "x": "ü\uffff"}, options={"inference_id": "once"})
            await answered(it, n)
        first, second = (response for response, _ in it.got)
        assert first["body"] == second["body"] == {"ran": "first"}
        assert (first["metadata"]["n"], second["metadata"]["n"]) == (1, 2)
        assert it.engine.started == ["first"]
        assert files(tmp_path) == ["once.json"]


async def test_a_failure_in_the_ledger_is_in_the_failure_path_too(tmp_path: Path) -> None:
    """As after a kill between the two."""
    async with opened(ledger=f"file://{tmp_path}/ledger", failure_path=f"file://{tmp_path}/bad") as it:
        await it.send("x", path="/nowhere", options={"inference_id": "f"})
        await answered(it)
        assert files(tmp_path) == ["bad/f.json", "ledger/f.json"]
        (tmp_path / "bad/f.json").unlink()
        await it.send("x", path="/nowhere", options={"inference_id": "f"})
        await answered(it, 2)
        assert files(tmp_path) == ["bad/f.json", "ledger/f.json"]
        assert {(tmp_path / name).read_bytes() for name in files(tmp_path)} == {it.got[0][1].body}
        assert it.got[0][1].body == it.got[1][1].body


async def test_a_ledger_that_is_away_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with flaky_stores(monkeypatch) as stores, opened(ledger=f"file://{tmp_path}/ledger") as it:
        await until(lambda: "ledger" in stores and stores["ledger"].calls)
        stores["ledger"].fail = {"read": [Transient("away")] * 2, "put": [Transient("away")] * 2}
        await it.send("x", options={"inference_id": "i"})
        (response,) = await answered(it)
        assert response["body"] == {"ran": "x"}
        assert it.engine.started == ["x"]


@pytest.mark.parametrize("rubbish", [b"", b"[1]", b"{}", b'{"body":1}', b"\xff", b"[" * 5000, b'{"status_code":"x"}'])
async def test_rubbish_in_the_ledger_stops_no_request(tmp_path: Path, rubbish: bytes) -> None:
    (tmp_path / "r.json").write_bytes(rubbish)
    async with opened(ledger=f"file://{tmp_path}") as it:
        await it.send("x", options={"inference_id": "r"})
        (response,) = await answered(it)
        assert response["body"] == {"ran": "x"}


def test_a_stored_answer_keeps_what_no_parser_would() -> None:
    stored = b'{"status_code":200,"metadata":{"b":1.10,"a":' + b"9" * 5000 + b'},"body":{"n":12345678901234567890}}'
    answer = stored_answer(stored, '{"b":1.10,"a":' + "9" * 5000 + "}", "name", "ledger")
    assert answer is not None
    assert answer.kept is not None
    assert answer.kept.wire == stored
    assert answer.body == {"n": 12345678901234567890}
    other = stored_answer(stored, None, "name", "ledger")
    assert other is not None
    assert other.kept is not None
    assert other.kept.wire == b'{"status_code":200,"metadata":null,"body":{"n":12345678901234567890}}'


def opened(**settings: Any) -> Any:
    engine = GateEngine()
    engine.open = True
    return bench(engine, **settings)


async def test_what_was_left_to_a_dead_letter_policy_is_left_to_it_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on Pub/Sub, which may deliver some times more before it takes the message away; here it never does."""
    monkeypatch.setattr(View, "max_attempts", 2, raising=False)
    async with workers(monkeypatch, 1, 30, gates_open=True, ledger=f"file://{tmp_path}", **RETRIES) as (it, them):
        them.engines[0].errors = {"bad": [Failed("no"), Failed("no")]}
        await it.send("bad")
        await them.turn(0)
        await it.responses_until(4)
        await until_empty(it)
        # Left three times; then it is believed that nobody takes it.
        assert [message.attributes["attempt"] for _, message in it.got] == ["2", "3", "4", "5"]
        assert len({message.body for _, message in it.got}) == 1
        assert them.runs == 2
