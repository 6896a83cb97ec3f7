"""Calls of a store, tried again for as long as it is away, as a broker's are."""

import asyncio
from collections.abc import AsyncIterator

from rejoinder.adapters import NotFound
from rejoinder.adapters.driver import BlobStore
from rejoinder.worker.retry import bounded, call_until

PIECE = 1 << 20
# Beyond the time that any call gets: what is uploaded more slowly than this is taken for stuck, and tried again.
SLOWEST = 1 << 20
"""Bytes per second."""


async def put_once(what: str, store: BlobStore, key: str, content: bytes | memoryview, content_type: str) -> bool:
    """Write an object unless there is one. After a try that broke off, False may mean that it was this content.

    Args:
        what: The call's name, for the log.
        store: Where.
        key: Of the object.
        content: All of it: it can be sent again.
        content_type: For a store that keeps one.

    Raises:
        AdapterError: the store refuses for good.
        ValueError: it cannot have that key.
    """

    async def one_try() -> bool:
        return await bounded(store.put(key, _pieces(content), content_type), beyond=len(content) / SLOWEST)

    return await call_until(what, one_try)


async def stands(what: str, store: BlobStore, key: str) -> bool:
    """Whether there is such an object. Raises as `put_once`."""

    async def one_try() -> bool:
        return await bounded(store.exists(key))

    return await call_until(what, one_try)


async def read_whole(what: str, store: BlobStore, key: str) -> bytes | None:
    """A small object's content; None where there is none. Raises as `put_once`."""

    async def one_try() -> bytes | None:
        try:
            return await bounded(_joined(store, key))
        except NotFound:
            return None

    return await call_until(what, one_try)


async def _joined(store: BlobStore, key: str) -> bytes:
    async with store.read(key) as blob:
        return b"".join([chunk async for chunk in blob.chunks])


async def _pieces(content: bytes | memoryview) -> AsyncIterator[bytes]:
    view = memoryview(content)
    for start in range(0, len(view), PIECE):
        yield bytes(view[start : start + PIECE])
        await asyncio.sleep(0)  # a store that takes them without waiting must not keep the loop for all of it
