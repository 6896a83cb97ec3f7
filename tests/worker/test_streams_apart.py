"""Many streams on a broker whose calls carry one ordering key each: one that is slow holds up no other."""

import asyncio
import json
import math
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pubsub_service import TOPIC, Service, serving
from talking import STREAM, Talker, flattened, place
from worker_harness import LIMIT, bench, until, until_backlog, until_empty

from rejoinder.adapters import Message, Topic, open_topic
from rejoinder.schemas.envelope import Options
from rejoinder.worker.handler import Answer, Job
from rejoinder.worker.lease import Lease
from rejoinder.worker.reply import UNDER_WAY, Replier
from rejoinder.worker.streaming import Streams, StreamWriter

URL = f"gcppubsub://{TOPIC}"
SLOW = 8
"""Calls that hang: more than there are at once of what gathers."""


class Slow:
    """A Pub/Sub service, over real gRPC, that takes its time with what the test says."""

    def __init__(self) -> None:
        self.service = Service()
        self.service.hooks["Publish"] = self._hook
        self.slow: Any = lambda _: False
        self.gate = asyncio.Event()
        self.waiting = 0
        self.under_way = Counter[str]()
        self.taken: list[dict[str, Any]] = []

    async def _hook(self, request: Any) -> None:
        message, *others = (json.loads(message.data) for message in request.messages)
        key = request.messages[0].ordering_key
        self.under_way[key] += 1
        assert not key or self.under_way[key] == 1, "two calls of one key at once"
        if self.slow(message):
            self.waiting += 1
            await self.gate.wait()
        self.under_way[key] -= 1
        self.taken += [message, *others]


@pytest.fixture
async def slow(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Slow]:
    one = Slow()
    async with serving(one.service) as address:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", address)
        yield one


def opened(streams: Streams, name: str) -> StreamWriter:
    lease = Lease(Message(name, b"", {}, 1, None, None), lambda: None, math.inf, math.inf, math.inf)
    job = Job("/run", None, name, 0, 1, f'"{name}"', Options(stream=True))
    return streams.open(lease.message, job, lease, lambda: True)


def streams_of(topic: Topic) -> Streams:
    return Streams(Replier(topic, "s"), carried=topic.max_body, interval=0.0, max_bytes=1000)


async def test_a_slow_call_holds_up_its_own_stream_alone(slow: Slow) -> None:
    slow.slow = lambda message: message["metadata"].startswith("slow")
    async with open_topic(URL) as topic:
        streams = streams_of(topic)
        slows, quicks = [f"slow{n}" for n in range(SLOW)], [f"s{n}" for n in range(2 * UNDER_WAY)]
        writers = {name: opened(streams, name) for name in slows + quicks}
        for name, writer in writers.items():
            writer.begin(lambda: None)(name)
        late = opened(streams, "late")
        async with asyncio.timeout(LIMIT):
            for name in quicks:
                answer = await writers[name].finish(Answer(200, "{}", None, "x"))
                assert answer.stream == place(1, done=True, chunks=0)
            late.begin(lambda: None)("late")
            await late.finish(Answer(200, "{}", None, "x"))
            assert sorted(one["body"] for one in slow.taken) == sorted([*quicks, "late"])
            slow.gate.set()
            for name in slows:
                await writers[name].finish(Answer(200, "{}", None, "x"))
        assert sorted(one["body"] for one in slow.taken[-SLOW:]) == sorted(slows)


async def test_many_streams_at_once_are_each_in_order(slow: Slow) -> None:
    async with open_topic(URL) as topic:
        streams = streams_of(topic)
        writers = {f"s{n}": opened(streams, f"s{n}") for n in range(2 * UNDER_WAY)}
        emits = {name: writer.begin(lambda: None) for name, writer in writers.items()}
        for number in range(30):
            for emit in emits.values():
                emit(number)
            await asyncio.sleep(0)
        async with asyncio.timeout(LIMIT):
            answers = [await writer.finish(Answer(200, "{}", None, "x")) for writer in writers.values()]
    for name, answer in zip(writers, answers, strict=True):
        messages = [one for one in slow.taken if one["metadata"] == name]
        assert [one["stream"]["index"] for one in messages] == [*range(len(messages))]
        assert [*flattened(messages)] == [*range(30)]
        assert answer.stream == place(len(messages), done=True, chunks=0)
    assert streams.bytes == 0


async def test_the_end_of_a_stream_that_is_slow_holds_up_no_answer(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    slow.slow = lambda message: message["body"].startswith("slow") and message["stream"]["done"]
    slows = [f"slow{n}" for n in range(SLOW)]
    async with bench(Talker(16), start=False) as it:
        monkeypatch.setattr("rejoinder.worker.service.open_topic", lambda _: open_topic(URL))
        it.start()
        engine: Talker = it.engine
        for body in (*slows, "quick"):
            await it.send(body, options=STREAM)
        await it.send("plain")
        await engine.begun(*slows, "quick", "plain")
        for body in (*slows, "quick", "plain"):  # in one turn of the loop: what waits for one another would do so
            engine.end(body, body)
        await until(lambda: slow.waiting == SLOW)
        await until_backlog(it, lambda backlog: (backlog.waiting, backlog.held) == (0, SLOW))
        assert sorted(one["body"] for one in slow.taken) == ["plain", "quick"]
        slow.gate.set()
        await until_empty(it)
