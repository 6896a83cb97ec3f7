"""Publishing: checked, batched, tried again, bounded."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import pytest

from rejoinder.adapters import AdapterError, Denied, Outgoing, TooLarge, Transient, open_subscription
from rejoinder.client import patience
from rejoinder.client import publish as module
from rejoinder.client.lines import Line
from rejoinder.client.publish import Outcome, Publisher
from rejoinder.schemas.wire import WireError

GOOD: dict[str, Any] = {"metadata": {"doc": 1}, "body": {"prompt": "x"}}


class FakeTopic:
    """Answers as it is told; the default is an id for each message."""

    name = "fake"
    max_body = 1000

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.batches: list[int] = []
        self.open_calls = self.most_open_calls = 0
        self.answer: Callable[[bytes, int], str | AdapterError] = lambda body, _: f"id-{body.decode()[:40]}"
        self.gate = asyncio.Event()
        self.gate.set()

    async def publish(self, batch: Sequence[Outgoing]) -> list[str | AdapterError]:
        self.open_calls += 1
        self.most_open_calls = max(self.most_open_calls, self.open_calls)
        self.batches.append(len(batch))
        self.bodies += [outgoing.body for outgoing in batch]
        await self.gate.wait()
        self.open_calls -= 1
        return [self.answer(outgoing.body, self.bodies.count(outgoing.body)) for outgoing in batch]


@pytest.fixture
async def topic(monkeypatch) -> FakeTopic:
    fake = FakeTopic()

    @asynccontextmanager
    async def open_fake(_url: str) -> AsyncIterator[FakeTopic]:
        yield fake

    monkeypatch.setattr(module, "open_topic", open_fake)
    monkeypatch.setattr(patience, "FIRST_DELAY", 0.0001)
    return fake


def numbered(count: int, size: int = 0) -> list[Line]:
    return [Line(number, b"%d%s" % (number, b" " * size)) for number in range(1, count + 1)]


async def stream(lines: list[Line], at_once: int = 100) -> AsyncIterator[list[Line]]:
    for start in range(0, len(lines), at_once):
        yield lines[start : start + at_once]


async def outcomes_of(publisher: Publisher, lines: list[Line], *, check: bool = False) -> list[Outcome]:
    async with aclosing(publisher.publish_lines(stream(lines), check=check)) as outcomes:
        return [outcome async for some in outcomes for outcome in some]


async def test_publishes_a_mapping_and_bytes() -> None:
    url = "memory://publisher"
    async with Publisher(url) as publisher, open_subscription(url) as subscription:
        ids = [await publisher.publish(GOOD), await publisher.publish(b' {"metadata": {}, "body": 1}')]
        got = await subscription.receive(10, 5)
        got += await subscription.receive(10, 5) if len(got) < 2 else []
    assert [message.id for message in got] == ids
    assert json.loads(got[0].body) == GOOD
    assert got[1].body == b' {"metadata": {}, "body": 1}'


async def test_refuses_what_is_not_a_request(topic) -> None:
    async with Publisher("fake") as publisher:
        with pytest.raises(WireError, match="metadata is missing"):
            await publisher.publish({"body": 1})
        with pytest.raises(ValueError, match="Out of range"):
            await publisher.publish({"metadata": {"x": float("nan")}, "body": 1})
        with pytest.raises(TooLarge, match="fake takes at most 1000"):
            await publisher.publish({"metadata": {}, "body": "x" * 1000})
        await publisher.publish(b"anything", check=False)
    assert topic.bodies == [b"anything"]


async def test_is_opened_first(topic) -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await Publisher("fake").publish(GOOD)


async def test_concurrent_calls_share_batches(topic) -> None:
    async with Publisher("fake") as publisher:
        ids = await asyncio.gather(*(publisher.publish(b"%d" % n, check=False) for n in range(1000)))
    assert ids == [f"id-{n}" for n in range(1000)]
    assert len(topic.batches) == 4
    assert topic.most_open_calls <= module.BATCHES_IN_FLIGHT


async def test_a_batch_is_bounded_in_bytes(topic, monkeypatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 50)
    async with Publisher("fake") as publisher:
        await asyncio.gather(*(publisher.publish(b"%020d" % n, check=False) for n in range(10)))
    assert topic.batches == [2] * 5


async def test_lines_in_order_with_bad_ones_between(topic) -> None:
    lines = [Line(1, json.dumps(GOOD).encode()), Line(3, b"nope"), Line(4, b'{"metadata": {}, "body": 2}')]
    async with Publisher("fake") as publisher:
        outcomes = await outcomes_of(publisher, lines, check=True)
    assert [outcome.line.number for outcome in outcomes] == [1, 3, 4]
    assert isinstance(outcomes[1].result, WireError)
    assert len(topic.bodies) == 2


async def test_only_what_failed_for_now_is_tried_again(topic) -> None:
    def answer(body: bytes, times: int) -> str | AdapterError:
        return Transient("busy") if int(body) % 2 and times < 3 else f"id-{int(body)}"

    topic.answer = answer
    async with Publisher("fake") as publisher:
        outcomes = await outcomes_of(publisher, numbered(10))
    assert [outcome.result for outcome in outcomes] == [f"id-{n}" for n in range(1, 11)]
    assert sorted(map(int, topic.bodies)) == sorted([*range(1, 11), *[1, 3, 5, 7, 9] * 2])


async def test_tries_end_and_what_is_final_is_not_tried_again(topic) -> None:
    topic.answer = lambda body, _: {b"1": Transient("busy"), b"2": Denied("no")}.get(body, "id")
    async with Publisher("fake") as publisher:
        outcomes = await outcomes_of(publisher, numbered(3))
    assert isinstance(outcomes[0].result, Transient)
    assert isinstance(outcomes[1].result, Denied)
    assert outcomes[2].result == "id"
    assert topic.bodies.count(b"1") == 1 + patience.RETRIES
    assert topic.bodies.count(b"2") == 1


async def test_a_message_that_is_sent_again_is_the_same_message(topic, monkeypatch) -> None:
    topic.answer = lambda body, times: Transient("busy") if times == 1 else f"id-{body.decode()}"
    whole = topic.publish
    sent: list[tuple[bytes, str | None]] = []

    async def publish(batch: Sequence[Outgoing]) -> list[str | AdapterError]:
        sent.extend((outgoing.body, outgoing.deduplication_id) for outgoing in batch)
        return await whole(batch)

    monkeypatch.setattr(topic, "publish", publish)
    async with Publisher("fake") as publisher:
        await outcomes_of(publisher, numbered(3))
    assert len(sent) == 6
    assert len(set(sent)) == 3
    assert len({identity for _, identity in sent} - {None}) == 3


async def test_a_call_that_raises_fails_its_messages_only(topic, monkeypatch) -> None:
    whole = topic.publish

    async def publish(batch: Sequence[Outgoing]) -> list[str | AdapterError]:
        if batch[0].body == b"1":
            raise Denied("no")
        return await whole(batch)

    monkeypatch.setattr(topic, "publish", publish)
    monkeypatch.setattr(module, "BATCH_MESSAGES", 2)
    async with Publisher("fake") as publisher:
        outcomes = await outcomes_of(publisher, numbered(4))
    assert [isinstance(outcome.result, Denied) for outcome in outcomes] == [True, True, False, False]


async def test_a_bug_in_an_adapter_is_raised_not_waited_for(topic) -> None:
    def answer(_body: bytes, _times: int) -> str:
        raise ZeroDivisionError

    topic.answer = answer
    async with asyncio.timeout(20):
        with pytest.raises(ZeroDivisionError):
            async with Publisher("fake") as publisher:
                await outcomes_of(publisher, numbered(3000))


async def test_holds_a_bounded_window(topic, monkeypatch) -> None:
    monkeypatch.setattr(module, "WINDOW_BYTES", 10_000)
    asked = most = 0

    async def counted() -> AsyncIterator[list[Line]]:
        nonlocal asked
        for line in numbered(3000, size=90):
            asked += 1
            yield [line]

    done = 0
    async with Publisher("fake") as publisher, aclosing(publisher.publish_lines(counted(), check=False)) as outcomes:
        async for some in outcomes:
            done += len(some)
            most = max(most, asked - done)
    assert done == 3000
    assert most <= 120


async def test_leaving_waits_for_what_is_in_flight(topic) -> None:
    topic.gate.clear()
    async with Publisher("fake") as publisher:
        waiting = asyncio.create_task(publisher.publish(b"1", check=False))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(topic.gate.set)
    assert await waiting == "id-1"


async def test_leaving_by_an_error_cancels_what_is_in_flight(topic) -> None:
    topic.gate.clear()
    tasks: list[asyncio.Task[str]] = []
    async with asyncio.timeout(20):
        with suppress(KeyError):
            async with Publisher("fake") as publisher:
                tasks = [asyncio.create_task(publisher.publish(b"%d" % n, check=False)) for n in range(2000)]
                while topic.open_calls < module.BATCHES_IN_FLIGHT:
                    await asyncio.sleep(0)
                raise KeyError
        assert all(
            isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*tasks, return_exceptions=True)
        )
