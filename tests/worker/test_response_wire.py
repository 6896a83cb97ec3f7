"""What goes beside a response's body, and responses that a broker cannot carry."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from group_queue import GroupQueue, opener
from virtual_time import virtually
from worker_harness import GateEngine, bench, flaky, until, until_empty

from rejoinder.adapters import AdapterError, Message, Outgoing, Refused, TooLarge
from rejoinder.worker import carrying
from rejoinder.worker.engines.echo import EchoEngine

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize("value", [TRACE, TRACE[:-1] + "0", "01" + TRACE[2:] + "-more", "cc" + TRACE[2:]])
def test_a_trace_context_is_passed_on(value: str) -> None:
    assert carrying.traceparent(value) == value


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "x",
        "ff" + TRACE[2:],
        TRACE.upper(),
        TRACE + "-more",
        TRACE + "\n",
        TRACE[:3] + "0" * 32 + TRACE[35:],
        TRACE[:36] + "0" * 16 + TRACE[52:],
        "01" + TRACE[2:] + "-" + "x" * 5000,
        "01" + TRACE[2:] + "-\x00",
    ],
)
def test_what_is_no_trace_context_is_not(value: str | None) -> None:
    assert carrying.traceparent(value) is None


@pytest.mark.parametrize("value", ["a", "doc 17", "é" * 512, "tab\there", "👩‍🚀"])
def test_an_attribute_that_can_be_carried_stays(value: str) -> None:
    assert carrying.attribute(value) == value


@pytest.mark.parametrize("value", ["", "\x00", "a\x7fb", "\x85", "\ufffe", "\ud800", "é" * 513, "x" * 1025])
def test_one_that_cannot_is_hashed(value: str) -> None:
    hashed = carrying.attribute(value)
    assert (len(hashed), hashed.isalnum(), hashed) == (64, True, carrying.attribute(value))


@pytest.mark.parametrize(("value", "stays"), [("a-1/~!", True), ("x" * 128, True), ("x" * 129, False), ("a b", False)])
def test_a_name_is_what_every_broker_takes(value: str, stays: bool) -> None:
    name = carrying.name(value)
    assert (name == value) is stays
    assert name != carrying.name(value + "x")


class Kept:
    """A topic that remembers what was published to it."""

    def __init__(self, inner: Any, refused: bytes = b"") -> None:
        self.inner = inner
        self.refused = refused
        self.apart = False
        """Whether one that is refused is an outcome of its own, and not the call's end."""
        self.published: list[Outgoing] = []

    async def __call__(self, batch: Sequence[Outgoing]) -> list[str | AdapterError]:
        bad = [bool(self.refused) and self.refused in outgoing.body for outgoing in batch]
        if any(bad) and not self.apart:
            raise ValueError("this broker cannot carry it")
        good = [outgoing for outgoing, is_bad in zip(batch, bad, strict=True) if not is_bad]
        self.published += good
        sent = iter(await self.inner().publish(good) if good else [])
        return [Refused("no such message here") if is_bad else next(sent) for is_bad in bad]


@virtually
async def test_a_response_carries_its_requests_key_and_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = GroupQueue()
    async with (
        bench(EchoEngine("/run"), start=False) as it,
        flaky(it, monkeypatch) as (_, topic),
    ):
        monkeypatch.setattr("rejoinder.worker.service.open_subscription", opener(queue))
        topic.publish = Kept(lambda: topic.inner)
        for key, name in (("plain", "doc-1"), ("plain", "doc-1"), ("with space é", "doc 2"), (None, "x" * 64)):
            envelope = {"path": "/run", "metadata": {}, "body": 1, "options": {"inference_id": name}}
            queue.send(key, json.dumps(envelope).encode())
        queue.send("plain", json.dumps({"path": "/run", "metadata": {}, "body": 1}).encode())
        it.start()
        await it.responses_until(5)
        published = topic.publish.published
        by_name = {outgoing.attributes["response_id"]: outgoing for outgoing in published}
        assert by_name["doc-1"].ordering_key == "plain"
        assert by_name["doc 2"].ordering_key == carrying.name("with space é") != "with space é"
        assert by_name["x" * 64].ordering_key is None
        identities = [outgoing.deduplication_id for outgoing in published]
        assert len(set(identities)) == 5, "requests that share an inference_id are both answered"
        assert set(identities) & set(by_name), "without an inference_id, the two names are one"
        assert identities == [carrying.name(str(identity)) for identity in identities]


@virtually
async def test_what_is_no_trace_context_does_not_reach_the_broker() -> None:
    async with bench(EchoEngine("/v1/completions")) as it:
        await it.request_topic.publish([Outgoing(b'{"metadata":{},"body":1}', {"traceparent": "not one"})])
        await it.responses_until(1)
        assert "traceparent" not in it.got[0][1].attributes


@pytest.mark.parametrize("apart", [False, True])
@virtually
async def test_a_response_that_cannot_be_carried_is_an_error_and_its_neighbours_arrive(
    monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    async with bench(start=False) as it, flaky(it, monkeypatch) as (_, topic):
        it.engine.open = True
        topic.publish = Kept(lambda: topic.inner, refused=b"odd")
        topic.publish.apart = apart
        for body in ("a", "odd", "b"):
            await it.send(body)
        it.start()
        await it.responses_until(3)
        statuses = {response["status_code"]: response for response, _ in it.got}
        assert sorted(response["status_code"] for response, _ in it.got) == [200, 200, 500]
        assert statuses[500]["metadata"] is None
        await until_empty(it)
        await it.stop()


@virtually
async def test_a_broker_that_carries_nothing_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(start=False) as it, flaky(it, monkeypatch) as (_, topic):
        it.engine.open = True
        topic.publish = Kept(lambda: topic.inner, refused=b"status_code")
        await it.send("a")
        it.start()
        await until(lambda: len(it.engine.started) > 3)
        topic.publish.refused = b""
        await it.responses_until(1)
        await until_empty(it)


@virtually
async def test_a_response_of_which_not_even_an_error_fits_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(start=False) as it, flaky(it, monkeypatch) as (_, topic):
        it.engine.open = True
        small = True

        async def publish(batch: Sequence[Outgoing]) -> list[str | AdapterError]:
            done: list[str | AdapterError] = await topic.inner.publish(batch)
            big = [small and outgoing.attributes["response_id"] == "big" for outgoing in batch]
            return [TooLarge("too large") if large else one for large, one in zip(big, done, strict=True)]

        topic.publish = publish
        await it.send("a", options={"inference_id": "big"})
        await it.send("b")
        it.start()
        await until(lambda: it.engine.started.count("a") > 2)
        small = False
        await until_empty(it)
        await it.stop()


@virtually
async def test_a_request_that_is_stored_elsewhere_is_403(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(GateEngine(), start=False) as it, flaky(it, monkeypatch) as (subscription, _):

        async def receive(limit: int, wait: float) -> list[Message]:
            messages = await subscription.inner.receive(limit, wait)
            return [replace(message, body=b"", stored_at="s3://bucket/key") for message in messages]

        subscription.receive = receive
        await it.send("a", {"id": 4})
        it.start()
        (response,) = await it.responses_until(1)
        assert (response["status_code"], response["metadata"]) == (403, None)
        assert "s3://bucket/key" in response["body"]["error"]["message"]
        await until_empty(it)
        assert it.engine.started == []
