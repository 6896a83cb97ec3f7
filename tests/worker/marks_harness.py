"""What a test of `Marks` does with a store of them."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from worker_harness import until

from rejoinder.adapters import open_blobs
from rejoinder.adapters.cancel_marks import mark_key
from rejoinder.adapters.driver import Listed
from rejoinder.adapters.memory import fresh_url
from rejoinder.worker.marks import Marks


class Store:
    """A real store that tells how many objects were listed, and whose listings of everything can be held up."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.listed: list[int] = []
        """Objects of each listing that is over, but of those of everything."""
        self.whole: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def list(self, after: str = "") -> AsyncGenerator[Listed, None]:
        count = 0
        async for one in self.inner.list(after):
            count += 1
            yield one
        if not after:
            await self.gate.wait()
        (self.listed if after else self.whole).append(count)


@asynccontextmanager
async def looking() -> AsyncIterator[tuple[Marks, Store]]:
    async with open_blobs(fresh_url()) as inner:
        store = Store(inner)
        marks = Marks(store, lambda: None)  # type: ignore[arg-type]
        try:
            yield marks, store
        finally:
            await marks.close()


async def leave(store: Any, name: str, at: float | None = None) -> str:
    """Leave a mark, by a clock that says `at`."""

    async def content() -> AsyncIterator[bytes]:
        yield name.encode()

    key = mark_key(name, time.time() if at is None else at)
    assert await store.put(key, content(), "text/plain")
    return key


async def keys_of(store: Any) -> set[str]:
    return {one.key async for one in store.inner.list()}


async def until_all(store: Store, count: int) -> None:
    """Until so many listings of everything are over, and what they bring has been dealt with."""
    await until(lambda: len(store.whole) >= count)
    for _ in range(10):
        await asyncio.sleep(0)
