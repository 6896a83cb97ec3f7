"""Responses whose message is only a pointer to where they are stored: `Message.stored_at`."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from rejoinder.adapters import AdapterError, BlobStore, Message, open_blobs
from rejoinder.client.patience import patiently

BodyOf = Callable[[Message], Awaitable[bytes]]


class NotRead(AdapterError):
    """A response is stored where nothing may be read. Its message was not acked."""


@asynccontextmanager
async def open_bodies(blobs: str | None) -> AsyncIterator[BodyOf]:
    """What returns the body of a message, wherever it is.

    Args:
        blobs: The store whose objects may be read, as `rejoinder.adapters.open_blobs` takes it. What a message points
            to is read nowhere else, since anybody who may send a message could name anything.

    Raises:
        AdapterError: the store cannot be opened. `BodyOf` raises it where it cannot be read, or `NotRead`.
    """
    if blobs is None:
        yield lambda message: _body(message, None)
    else:
        async with open_blobs(blobs) as store:
            yield lambda message: _body(message, store)


async def _body(message: Message, store: BlobStore | None) -> bytes:
    location = message.stored_at
    if location is None:
        return message.body
    if store is None:
        raise NotRead(f"a response is stored at {location!r:.1100}: name the store to read it from (--blobs)")
    if not location.startswith(f"{store.url}/"):
        raise NotRead(f"a response is stored at {location!r:.1100}, which is not below {store.url!r}")
    return await patiently(lambda: _read(store, location.removeprefix(f"{store.url}/")))


async def _read(store: BlobStore, key: str) -> bytes:
    try:
        async with store.read(key) as blob:
            return b"".join([chunk async for chunk in blob.chunks])
    except ValueError as exc:
        raise NotRead(f"a response is stored at {key!r:.1100} of {store.url!r}: {exc}") from exc
