"""Receiving responses: acked when dealt with, let go otherwise."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rejoinder.adapters import Backlog, Message, Outgoing, Subscription, Transient, open_subscription, open_topic
from rejoinder.client import consume as module
from rejoinder.client import patience
from rejoinder.client.collect import collect, open_kept
from rejoinder.client.consume import batches, responses
from rejoinder.client.join import Join


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/work.db?queue=responses"


async def put(url: str, count: int, start: int = 0) -> None:
    async with open_topic(url) as topic:
        bodies = [b'{"status_code":200,"metadata":{"n":%d},"body":null}' % n for n in range(start, start + count)]
        outcomes = await topic.publish([Outgoing(body, {"response_id": "r"}) for body in bodies])
        assert all(isinstance(outcome, str) for outcome in outcomes)


async def backlog(url: str) -> Backlog:
    async with open_subscription(url) as subscription:
        return await subscription.backlog()


def number(received: module.Received) -> int:
    metadata = received.read().metadata
    assert metadata is not None
    return int(metadata["n"])


async def test_receives_in_order_and_acks(url) -> None:
    await put(url, 10)
    got = [received async for received in responses(url, count=10)]
    assert list(map(number, got)) == list(range(10))
    assert dict(got[0].attributes) == {"response_id": "r"}
    assert await backlog(url) == Backlog(waiting=0, held=0, dead=None)


async def test_count_leaves_the_rest_to_others(url) -> None:
    await put(url, 10)
    assert len([received async for received in responses(url, count=3)]) == 3
    assert await backlog(url) == Backlog(waiting=7, held=0, dead=None)
    assert [received async for received in responses(url, count=0)] == []


async def test_ends_when_idle(url) -> None:
    await put(url, 2)
    assert len([received async for received in responses(url, idle=0.05)]) == 2
    assert [received async for received in responses(url, idle=0)] == []


class Tens:
    """A subscription that gives ten messages in one receive, and knows how many receives are under way."""

    def __init__(self, inner: Subscription) -> None:
        self.inner = inner
        self.max_receive = 10
        self.under_way = 0
        self.most = 0
        self.hang = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def receive(self, limit: int, wait: float) -> list[Message]:
        assert 1 <= limit <= 256
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            messages = await self.inner.receive(min(limit, 10), wait)
            try:
                while self.hang and self.under_way > 2:
                    await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                await self.inner.set_lease(messages, 0)  # cancelling loses nothing
                raise
            return messages
        finally:
            self.under_way -= 1


@pytest.fixture
def tens(monkeypatch: pytest.MonkeyPatch) -> list[Tens]:
    """What is opened, in the order of opening."""
    opened: list[Tens] = []

    @asynccontextmanager
    async def opening(url: str) -> AsyncIterator[Tens]:
        async with open_subscription(url) as inner:
            opened.append(Tens(inner))
            yield opened[-1]

    monkeypatch.setattr(module, "open_subscription", opening)
    return opened


@pytest.mark.parametrize("count", [None, 500])
async def test_where_one_receive_brings_few_several_go_together(url, tens: list[Tens], count: int | None) -> None:
    await put(url, 505)
    idle = 0.0 if count is None else None
    got = [number(received) async for received in responses(url, count=count, idle=idle)]
    assert sorted(got) == list(range(count or 505))
    assert tens[0].most > 4
    assert await backlog(url) == Backlog(waiting=505 - len(got), held=0, dead=None)


async def test_one_receive_is_enough_for_few(url, tens: list[Tens]) -> None:
    await put(url, 19)
    assert len([received async for received in responses(url, idle=0)]) == 19
    assert tens[0].most == 1


async def test_cancelled_between_receives_nothing_stays_leased(url, tens: list[Tens]) -> None:
    await put(url, 500)

    async def consume() -> None:
        async for _ in responses(url):
            tens[0].hang = tens[0].most > 2

    task = asyncio.create_task(consume())
    async with asyncio.timeout(20):
        while not (tens and tens[0].hang and tens[0].under_way > 2):
            await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.wait({task})
    left = await backlog(url)
    assert left.held == 0
    assert left.waiting


async def test_what_was_broken_off_comes_again(url) -> None:
    await put(url, 5)
    async with aclosing(responses(url)) as incoming:
        async for received in incoming:
            if number(received) == 2:
                break
    assert await backlog(url) == Backlog(waiting=3, held=0, dead=None)
    again = [number(received) async for received in responses(url, count=3)]
    assert sorted(again) == [2, 3, 4]


async def test_a_long_batch_is_renewed(url, monkeypatch) -> None:
    await put(url, 4)
    monkeypatch.setattr(module, "RENEW_AT", 0.0)
    assert len([received async for received in responses(url, count=4)]) == 4
    assert await backlog(url) == Backlog(waiting=0, held=0, dead=None)


async def test_what_was_lost_meanwhile_is_not_given(url, monkeypatch) -> None:
    await put(url, 3)
    monkeypatch.setattr(module, "RENEW_AT", 1e9)
    async with aclosing(responses(f"{url}&lease=1", idle=0.05)) as mine:
        first = await anext(mine)
        async with asyncio.timeout(30):  # the others wait until the leases end
            taken = [number(received) async for received in responses(url, count=3)]
        monkeypatch.setattr(module, "RENEW_AT", 0.0)
        assert [number(received) async for received in mine] == []
    assert number(first) == 0
    assert taken == [0, 1, 2]


async def test_a_broker_that_is_away_for_a_moment(url, monkeypatch) -> None:
    await put(url, 2)
    monkeypatch.setattr(patience, "FIRST_DELAY", 0.0001)
    away = 3

    async with open_subscription(url) as subscription:
        kind = type(subscription)
    whole = kind.receive

    async def receive(self, limit: int, wait: float):
        nonlocal away
        away -= 1
        if away >= 0:
            raise Transient("away")
        return await whole(self, limit, wait)

    monkeypatch.setattr(kind, "receive", receive)
    assert len([received async for received in responses(url, count=2)]) == 2
    away = 100
    with pytest.raises(Transient):
        await anext(responses(url))


async def test_batches_until(url) -> None:
    await put(url, 5)
    seen: list[int] = []
    async for batch in batches(url, until=lambda: seen[-1:] == [4]):  # noqa: B023  # bound before the loop
        seen += map(number, batch)
    assert seen == list(range(5))
    assert await backlog(url) == Backlog(waiting=0, held=0, dead=None)


async def test_collects_until_all_are_answered(url, tmp_path) -> None:
    requests, kept = tmp_path / "requests", tmp_path / "kept"
    requests.write_text("".join(json.dumps({"metadata": {"n": n}, "body": 0}) + "\n" for n in range(6)))
    await put(url, 2)
    kept.write_text('{"status_code":200,"metadata":{"n":5},"body":null}\n{"status_co')
    for idle, answered in ((0.05, 3), (None, 6)):
        with open_kept(kept) as file, Join(requests, kept) as join:
            join.read_requests()
            join.read_responses()
            await collect(join, url, file, idle=idle)
            assert join.answered == answered
            assert not any(join.counts.values())
        await put(url, 3, start=2)
    assert await backlog(url) == Backlog(waiting=3, held=0, dead=None)


@pytest.mark.parametrize(("before", "after"), [(b"", b""), (b"half", b""), (b"one\nhal", b"one\n"), (b"a\n", b"a\n")])
def test_a_half_line_is_dropped(tmp_path, monkeypatch, before: bytes, after: bytes) -> None:
    monkeypatch.setattr("rejoinder.client.collect.BLOCK", 3)
    (tmp_path / "kept").write_bytes(before)
    with open_kept(tmp_path / "kept") as file:
        file.write(b"more\n")
    assert (tmp_path / "kept").read_bytes() == after + b"more\n"
