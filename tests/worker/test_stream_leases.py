"""Streams whose lease is lost, and streams under way when the worker stops."""

import asyncio
import json
import math
from collections.abc import Sequence
from typing import cast

import pytest
from group_queue import GroupQueue, opener
from talking import STREAM, Talker, place, places, streaming_bench
from virtual_time import virtually
from worker_harness import LIMIT, bench, flaky, until, until_backlog, until_empty

from rejoinder.adapters import Message, Outgoing, Topic, Transient
from rejoinder.schemas.envelope import Options
from rejoinder.worker import consumer
from rejoinder.worker.handler import Answer, Job
from rejoinder.worker.lease import Lease
from rejoinder.worker.reply import Replier
from rejoinder.worker.streaming import Streams, StreamWriter


@pytest.mark.parametrize("counts", [True, False])
@virtually
async def test_nothing_is_published_after_a_lost_lease(counts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = GroupQueue(counts=counts)
    monkeypatch.setattr("rejoinder.worker.service.open_subscription", opener(queue))
    async with bench(Talker(), stream_interval_ms=0) as it:
        engine: Talker = it.engine
        number = queue.send(None, REQUEST)
        await engine.begun("a")
        engine.say("a", "before")
        await it.responses_until(1)
        first = engine.requests["a"].emit
        assert first is not None
        queue.lapse(number)
        await engine.begun("a", times=2)
        await until(lambda: engine.cancelled == ["a"])
        first("never")
        engine.say("a", "again")
        engine.end("a", "end")
        got = await it.responses_until(3)
        await until(lambda: not queue.left)
        assert places(got) == [("before", 0, False), ("again", 0, False), ("end", 1, True)]
        attempts = [one["stream"]["attempt"] for one in got]
        assert attempts[0] < attempts[1] == attempts[2]
        assert not counts or attempts == [1, 2, 2]
        assert all(("attempt" in message.attributes) == counts for _, message in it.got)


REQUEST = json.dumps({"path": "/run", "metadata": {}, "body": "a", "options": STREAM}).encode()


@virtually
async def test_a_lease_lost_while_a_chunk_waits_for_the_broker_lets_it_not_go(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = GroupQueue()
    async with bench(Talker(), start=False, stream_interval_ms=0) as it, flaky(it, monkeypatch) as (_, topic):
        monkeypatch.setattr("rejoinder.worker.service.open_subscription", opener(queue))
        it.start()
        engine: Talker = it.engine
        number = queue.send(None, REQUEST)
        await engine.begun("a")
        topic.fail["publish"] = [Transient("away")] * 1000
        engine.say("a", "old")
        await until(lambda: len(topic.fail["publish"]) < 998)
        queue.lapse(number)
        await until(lambda: engine.cancelled == ["a"])
        topic.fail.clear()
        await engine.begun("a", times=2)
        engine.end("a", "end")
        got = await it.responses_until(1)
        await until(lambda: not queue.left)
        assert places(got) == [("end", 0, True)]
        assert len(it.got) == 1


class Gated:
    """A topic whose calls return when the test says so."""

    name, max_body, max_keys = "gated", 10_000, 500

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.under_way = 0
        self.sent: list[str] = []

    async def publish(self, batch: Sequence[Outgoing]) -> list[str]:
        self.under_way += 1
        await self.open.wait()
        self.sent += [json.loads(one.body)["body"] for one in batch]
        return ["id"] * len(batch)


@virtually
async def test_what_waited_behind_others_is_not_published_once_its_lease_has_run_out() -> None:
    topic = Gated()
    streams = Streams(Replier(cast("Topic", topic), "s"), carried=10_000, interval=0.0, max_bytes=1000)
    looked: list[str] = []

    def opened(name: str) -> tuple[StreamWriter, Lease]:
        lease = Lease(Message(name, b"", {}, 1, None, None), lambda: None, math.inf, math.inf, math.inf)
        job = Job("/run", None, name, 0, 1, "{}", Options(stream=True))
        writer = streams.open(lease.message, job, lease, lambda: looked.append(name) is None)
        writer.begin(lambda: None)(name)
        return writer, lease

    others = []
    for name in "ab":  # as many as there are calls at once
        others.append(opened(name)[0])
        await until(lambda: topic.under_way == len(others))
    late, lease = opened("late")
    await asyncio.sleep(0)
    lease.ends = 0.0
    topic.open.set()
    for other in others:
        await other.finish(Answer(200, "{}", None, "x"))
    await until(lambda: looked.count("late") >= 2)
    assert topic.sent == ["a", "b"]
    lease.ends = math.inf  # it was renewed after all
    answer = await late.finish(Answer(200, "{}", None, "late"))
    assert topic.sent == ["a", "b", "late"]
    assert answer.stream == place(1, done=True, chunks=0)


@virtually
async def test_a_stop_lets_a_stream_come_to_its_end() -> None:
    async with bench(Talker(), stream_interval_ms=60_000) as it:
        engine = await streaming_bench(it, "a")
        engine.say("a", 1)
        await it.responses_until(1)
        engine.say("a", 2)
        it.signals.receive("SIGTERM")
        engine.end("a", 3)
        assert it.task is not None
        await asyncio.wait_for(it.task, LIMIT)
        it.task = None
        assert places(await it.responses_until(3)) == [(1, 0, False), (2, 1, False), (3, 2, True)]
        await until_empty(it)


@pytest.mark.parametrize("away", [False, True])
@virtually
async def test_a_stop_hands_back_a_stream_that_goes_on_for_too_long(
    away: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(Talker(), start=False, grace_seconds=0.2) as it, flaky(it, monkeypatch) as (_, topic):
        it.start()
        engine = await streaming_bench(it, "a")
        engine.say("a", 1)
        await it.responses_until(1)
        if away:  # it has said all, and the broker does not take it
            topic.fail["publish"] = [Transient("away")] * 100_000
            engine.say("a", 2)
            engine.end("a", 3)
        await it.stop()
        it.task = None
        assert engine.cancelled == ([] if away else ["a"])
        topic.fail.clear()
        await until_backlog(it, lambda backlog: backlog.waiting == 1)
        assert not await it.response_subscription.receive(1, 0.05)


async def test_an_end_that_hangs_as_the_worker_stops_is_not_published_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumer, "LAST_SECONDS", 0.2)
    async with bench(Talker(), start=False, grace_seconds=0.2) as it, flaky(it, monkeypatch) as (_, topic):
        it.start()
        engine = await streaming_bench(it, "a")
        topic.hang.add("publish")
        engine.end("a", 1)
        await until(lambda: topic.under_way)
        await it.stop()
        it.task = None
        assert topic.under_way == 0, "it goes on, and the message is another worker's"
        await until_backlog(it, lambda backlog: backlog.waiting == 1)
