"""Responses whose message is only a pointer to where they are stored: read from there, or left in the queue."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aws_resources import make_queue, name_of

from rejoinder.adapters import (
    Backlog,
    Message,
    NotFound,
    Outgoing,
    Subscription,
    open_blobs,
    open_subscription,
    open_topic,
)
from rejoinder.client import consume as module
from rejoinder.client.collect import collect, open_kept
from rejoinder.client.consume import Received, batches, responses
from rejoinder.client.join import Join
from rejoinder.client.stored import NotRead

POINTER = b"pointer:"


def body(number: int) -> bytes:
    return b'{"status_code":200,"metadata":{"n":%d},"body":null,"output_location":"s3://b/%d"}' % (number, number)


class Pointing:
    """A subscription of a broker that knows pointers: a body that begins with `pointer:` is one."""

    def __init__(self, inner: Subscription) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def receive(self, limit: int, wait: float) -> list[Message]:
        return [
            replace(message, body=b"", stored_at=message.body.removeprefix(POINTER).decode())
            if message.body.startswith(POINTER)
            else message
            for message in await self._inner.receive(limit, wait)
        ]


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    @asynccontextmanager
    async def opening(url: str) -> AsyncIterator[Pointing]:
        async with open_subscription(url) as inner:
            yield Pointing(inner)

    monkeypatch.setattr(module, "open_subscription", opening)
    return f"sqlite:///{tmp_path}/work.db?queue=responses"


async def put(url: str, *bodies: bytes) -> None:
    async with open_topic(url) as topic:
        outcomes = await topic.publish([Outgoing(one) for one in bodies])
        assert all(isinstance(outcome, str) for outcome in outcomes)


async def store(blobs: str, key: str, data: bytes) -> bytes:
    """Store an object; give the body of a message that points to it."""

    async def chunks() -> AsyncIterator[bytes]:
        yield data[:5]
        yield data[5:]

    async with open_blobs(blobs) as blobs_store:
        assert await blobs_store.put(key, chunks(), "application/json")
        return POINTER + blobs_store.location(key).encode()


async def take(source: AsyncIterator[Any], into: list[Any]) -> None:
    """Receive until it ends or raises."""
    async for one in source:
        into.append(one)  # noqa: PERF401  # what came before it raises is wanted


async def backlog(url: str) -> Backlog:
    async with open_subscription(url) as subscription:
        return await subscription.backlog()


async def test_a_pointer_is_read_from_its_store(url: str, tmp_path: Path) -> None:
    blobs = f"file://{tmp_path}/blobs"
    await put(url, body(0), await store(blobs, "responses/a b+é.json", body(1)), body(2))
    got = [received.body async for received in responses(url, count=3, blobs=blobs)]
    assert got == [body(0), body(1), body(2)]
    assert await backlog(url) == Backlog(waiting=0, held=0, dead=None)


async def test_batches_give_a_pointer_by_itself(url: str, tmp_path: Path) -> None:
    blobs = f"file://{tmp_path}/blobs"
    pointers = [await store(blobs, f"responses/{number}.json", body(number)) for number in (2, 3)]
    await put(url, body(0), body(1), *pointers, body(4))
    got = [[received.body for received in batch] async for batch in batches(url, idle=0, blobs=blobs)]
    assert got == [[body(0), body(1)], [body(2)], [body(3)], [body(4)]]
    assert await backlog(url) == Backlog(waiting=0, held=0, dead=None)


@pytest.mark.parametrize(
    ("blobs", "location", "message"),
    [
        (None, "s3://b/k", r"stored at 's3://b/k': name the store to read it from .--blobs."),
        ("file:///there/blobs", "s3://b/k", r"'s3://b/k', which is not below 'file:///there/blobs'"),
        ("file:///there/blobs", "file:///there/blobs2/k", "which is not below 'file:///there/blobs'"),
        ("file:///there/blobs", "file:///there/blobs/../../etc/passwd", "passwd"),
        ("file:///there/blobs", "file:///there/blobs", "which is not below"),
    ],
)
async def test_what_may_not_be_read_stays_in_the_queue(
    url: str, blobs: str | None, location: str, message: str
) -> None:
    await put(url, body(0), POINTER + location.encode(), body(2))
    got: list[Received] = []
    with pytest.raises(NotRead, match=message) as caught:
        await take(responses(url, idle=0, blobs=blobs), got)
    assert "\n" not in str(caught.value)
    assert [received.body for received in got] == [body(0)]
    assert await backlog(url) == Backlog(waiting=2, held=0, dead=None)
    with pytest.raises(NotRead, match=message):
        await take(batches(url, idle=0, blobs=blobs), got)
    assert len(got) == 1
    assert await backlog(url) == Backlog(waiting=2, held=0, dead=None)


async def test_an_object_that_is_not_there_leaves_its_pointer_in_the_queue(url: str, tmp_path: Path) -> None:
    blobs = f"file://{tmp_path}/blobs"
    await store(blobs, "responses/there.json", body(0))
    await put(url, POINTER + f"file://{tmp_path}/blobs/responses/gone.json".encode())
    with pytest.raises(NotFound):
        await take(responses(url, idle=0, blobs=blobs), [])
    assert await backlog(url) == Backlog(waiting=1, held=0, dead=None)


async def test_a_join_keeps_what_the_pointer_stands_for(url: str, tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_bytes(b'{"metadata":{"n":0},"body":1}\n{"metadata":{"n":1},"body":1}\n')
    blobs = f"file://{tmp_path}/blobs"
    await put(url, await store(blobs, "responses/1.json", body(1)), body(0))
    kept = tmp_path / "kept"
    with open_kept(kept) as file, Join(requests, kept) as joining:
        joining.read_requests()
        await collect(joining, url, file, blobs=blobs)
        joined = list(joining.joined())
    # A result that is stored is joined as it is: where it is stands in the response.
    assert [b'"output_location":"s3://b/%d"' % number in line for number, line in enumerate(joined)] == [True, True]
    assert await backlog(url) == Backlog(waiting=0, held=0, dead=None)


async def test_sqs_keeps_a_pointer_that_nobody_may_read(aws) -> None:
    queue, _ = await make_queue()
    url = f"awssqs:///{name_of(queue)}"
    async with open_topic(url) as topic:
        (sent,) = await topic.publish([Outgoing(b"", stored_at="s3://b/k", stored_size=9)])
    with pytest.raises(NotRead, match=r"'s3://b/k': name the store"):
        await take(responses(url), [])
    async with open_subscription(url) as subscription:
        (message,) = await subscription.receive(1, 60)
        assert (message.id, message.stored_at, dict(message.attributes)) == (sent, "s3://b/k", {})
