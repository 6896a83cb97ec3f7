"""However chunks come, and however slowly the broker takes them: the messages together hold exactly the stream."""

import asyncio
import json
import math
from collections.abc import Sequence
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st
from talking import flattened

from rejoinder.adapters import AdapterError, Message, Outgoing, Topic, Transient
from rejoinder.schemas.chunks import json_size
from rejoinder.schemas.envelope import Options, Response
from rejoinder.worker.handler import Answer, Job
from rejoinder.worker.lease import Lease
from rejoinder.worker.reply import Replier
from rejoinder.worker.streaming import Streams

CARRIED = 2000
TEXTS = st.text(alphabet=st.sampled_from(["a", " ", "é", "😀", '"', "\\", "\x01", "\uffff"]), max_size=40)
ANY = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | TEXTS, lambda inner: st.lists(inner, max_size=3))


class SlowTopic:
    """A topic that takes its turns over a call, and is away now and then, as it is told."""

    name, max_body, max_keys = "slow", CARRIED, 500

    def __init__(self, turns: Sequence[int]) -> None:
        self.turns = list(turns)
        self.sent: list[Outgoing] = []
        self.under_way = 0

    async def publish(self, batch: Sequence[Outgoing]) -> list[str | AdapterError]:
        self.under_way += 1
        assert self.under_way == 1, "one publish at a time"
        turns = self.turns.pop() if self.turns else 0
        for _ in range(abs(turns)):
            await asyncio.sleep(0)
        self.under_way -= 1
        if turns < 0:
            return [Transient("away")] * len(batch)
        self.sent += batch
        return ["id"] * len(batch)


def chat(text: str, index: int, *, last: bool) -> dict[str, Any]:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": "stop" if last else None}
    return {"id": "x", "object": "chat.completion.chunk", "choices": [choice]}


CHAT = st.builds(chat, TEXTS, st.integers(0, 1), last=st.sampled_from([False] * 5 + [True]))


async def stream(chunks: Sequence[tuple[Any, int]], turns: Sequence[int], max_bytes: int, path: str) -> SlowTopic:
    """Write a stream whose chunks come after so many turns of the event loop each."""
    topic = SlowTopic(turns)
    streams = Streams(Replier(cast("Topic", topic), "s"), carried=CARRIED, interval=0.0, max_bytes=max_bytes)
    message = Message("m", b"", {}, 3, None, None)
    lease = Lease(message, lambda: None, math.inf, math.inf, math.inf)
    writer = streams.open(message, Job(path, None, "r", 0, 3, "{}", Options(stream=True)), lease, lambda: True)
    emit = writer.begin(lambda: None)
    for chunk, pause in chunks:
        emit(chunk)
        for _ in range(pause):
            await asyncio.sleep(0)
    answer = await writer.finish(Answer(200, "{}", {"usage": 1}, "r"))
    assert answer.status_code == 200, answer.body
    assert answer.stream == {"index": len(topic.sent), "done": True, "attempt": 3}
    assert streams.bytes == 0
    return topic


def responses(topic: SlowTopic, max_bytes: int) -> list[dict[str, Any]]:
    """What was sent, after a look at each by itself."""
    found = []
    for index, one in enumerate(topic.sent):
        assert len(one.body) <= CARRIED
        response = json.loads(one.body)
        Response.model_validate(response)
        assert response["stream"]["index"] == index
        assert not response["stream"]["done"]
        assert response["stream"].get("chunks", 1) == 1 or json_size(response["body"]) - 2 <= max_bytes
        found.append(response)
    return found


PAUSES = st.integers(0, 4)
TURNS = st.lists(st.integers(0, 8), max_size=20)
SIZES = st.sampled_from([1, 60, 300, 10**6])


@settings(deadline=None)
@given(st.lists(st.tuples(ANY, PAUSES), max_size=30), TURNS, SIZES)
def test_any_chunks_come_whole_and_in_order(chunks: list[tuple[Any, int]], turns: list[int], size: int) -> None:
    topic = asyncio.run(stream(chunks, turns, size, "/run"))
    assert [*flattened(responses(topic, size))] == [chunk for chunk, _ in chunks]


def said(chunks: Sequence[Any]) -> list[Any]:
    """What a reader gets: between what is no chunk of a chat, of each choice its text up to each of its ends."""
    told: list[Any] = [{}]
    for chunk in chunks:
        if not isinstance(chunk, dict):
            told += [chunk, {}]
            continue
        for choice in chunk["choices"]:
            texts = told[-1].setdefault(choice["index"], [""])
            texts[-1] += choice["delta"]["content"]
            if choice["finish_reason"]:
                texts.append("")
    return told


@settings(deadline=None)
@given(st.lists(st.tuples(CHAT | CHAT | CHAT | ANY, PAUSES), max_size=30), TURNS, SIZES)
def test_merged_chunks_say_the_same(chunks: list[tuple[Any, int]], turns: list[int], size: int) -> None:
    topic = asyncio.run(stream(chunks, turns, size, "/v1/chat/completions"))
    found = [*flattened(responses(topic, size))]
    assert said(found) == said([chunk for chunk, _ in chunks])
    assert len(found) <= len(chunks)


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(ANY, PAUSES), min_size=1, max_size=10), st.lists(st.integers(-3, 3), max_size=3))
def test_a_broker_that_is_away_changes_nothing(chunks: list[tuple[Any, int]], turns: list[int]) -> None:
    topic = asyncio.run(stream(chunks, turns, 300, "/run"))
    assert [*flattened(responses(topic, 300))] == [chunk for chunk, _ in chunks]
