"""What the tests of all stores share."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from rejoinder.adapters import NotFound, open_blobs

MIB = 1 << 20
LONG = 20 * MIB  # several parts of every store
KEYS = ["a", "a b/c+d", "é/日本/🙂", "100%/a%2Fb%20c", "a?b=c&d#e", "~!@$*()'\";:,=[]{}|<>^`\\", ".hidden/..more/x."]


@pytest.fixture
async def bench(request, tmp_path):
    """Every store, one after the other: (what it is, its URL, the store)."""
    kind = request.param
    service = request.getfixturevalue(kind.service) if kind.service else None
    url = await kind.make(tmp_path, service)
    async with AsyncExitStack() as stack:
        bench = Bench(kind, url, service)
        bench.store = await stack.enter_async_context(open_blobs(url))
        yield bench


class Bench:
    store = None

    def __init__(self, kind, url, service):
        self.kind, self.url, self.service = kind, url, service

    async def left(self):
        return await self.kind.left(self.url, self.service)


async def stream(content: bytes, size: int = 100_000):
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def content_of(store, key: str) -> bytes:
    async with store.read(key) as blob:
        content = b"".join([chunk async for chunk in blob.chunks])
        assert blob.size == len(content)
        return content


async def keys_of(store) -> list[str]:
    return sorted([one.key async for one in store.list()])


async def nothing_at(bench, key: str) -> bool:
    with pytest.raises(NotFound):
        async with bench.store.read(key):
            pass
    return not await bench.store.exists(key) and await bench.left() == []


async def put_under_way(store, key, size):
    """A put whose content does not end: so much of it was taken."""
    taken = asyncio.Event()

    async def endless():
        async for chunk in stream(b"x" * size):
            yield chunk
        taken.set()
        await asyncio.Event().wait()

    putting = asyncio.create_task(store.put(key, endless(), "text/plain"))
    await taken.wait()
    return putting
