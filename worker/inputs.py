"""Reads what a request names by its location: a body, or the lines that a job runs one by one."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from rejoinder.adapters import AdapterError, Blob, BlobStore, Denied, NotFound
from rejoinder.schemas.values import read_text, read_value
from rejoinder.schemas.wire import WireError
from rejoinder.worker.content import Form, form_of
from rejoinder.worker.errors import BadRequest, Forbidden, Missing, RequestTooLarge, Unavailable
from rejoinder.worker.retry import bounded
from rejoinder.worker.room import Room, Share
from rejoinder.worker.stores import Stores

# Inputs in memory, in bytes of the objects. Messages that wait for room here are held, and read when others are done.
MAX_HELD_INPUTS = 256 * 1024 * 1024
# Objects being read at once: enough that their round trips overlap, few enough for any store's connections.
READS = 16
# Parsing holds the GIL for most of its time, so a thread is no cure; but between its parts it lets the event loop in.
PARSE_IN_THREAD_BYTES = 256 * 1024
LOCATION = "input_location"


@dataclass(frozen=True, slots=True)
class Source:
    """An object that may be read."""

    store: BlobStore
    key: str
    location: str
    param: str | None
    """The field that names it; None: the message itself is a pointer to it."""

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Blob]:
        """Open it.

        Raises:
            Missing, Forbidden: as the store says.
            Unavailable: the store is away, also while it is read.
        """
        async with AsyncExitStack() as stack:
            with self._told():
                blob = await bounded(stack.enter_async_context(self.store.read(self.key)))
            chunks = self._chunks(blob.chunks)
            stack.push_async_callback(chunks.aclose)
            yield Blob(blob.size, blob.content_type, chunks)

    async def _chunks(self, chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        with self._told():
            while (chunk := await bounded(anext(chunks, None))) is not None:
                yield chunk

    async def whole(self, blob: Blob, limit: int) -> bytearray:
        """All of it. Raises RequestTooLarge where it is longer than `limit`, whatever the store said of its size."""
        data = bytearray()
        async for chunk in blob.chunks:
            self.check_size(len(data) + len(chunk), limit)
            data += chunk
        return data

    def check_size(self, size: int, limit: int) -> None:
        """Raise RequestTooLarge for more than `limit` bytes."""
        if size > limit:
            raise RequestTooLarge(
                f"{self.location} has {size} bytes or more; at most {limit} are read", param=self.param
            )

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Map what the store says to the request's own errors."""
        try:
            yield
        except NotFound as exc:
            raise Missing(f"there is nothing at {self.location}", param=self.param) from exc
        except Denied as exc:
            raise Forbidden(f"{self.location} may not be read: {_rest(exc, self.location)}", param=self.param) from exc
        except AdapterError as exc:
            raise Unavailable(
                f"{self.location} cannot be read now: {_rest(exc, self.location)}", param=self.param
            ) from exc


def _rest(error: AdapterError, location: str) -> str:
    """What a store says, without the name of the object where it begins with that."""
    return str(error).removeprefix(f"{location}: ")


@dataclass(frozen=True, slots=True)
class Lines:
    """An input of JSON lines, of which nothing is read yet."""

    source: Source


class Inputs:
    """Reads objects by location.

    Args:
        stores: What may be read from.
        max_input_bytes: A larger object that is one document is answered 413.
    """

    def __init__(self, stores: Stores, max_input_bytes: int) -> None:
        self._stores = stores
        self._limit = max_input_bytes
        self.room = Room(MAX_HELD_INPUTS)
        self._reads = asyncio.Semaphore(READS)

    async def body(self, location: str, content_type: str | None, share: Share) -> Any:
        """The body that an object is, or `Lines`.

        Args:
            location: Where it is.
            content_type: `options.content_type`.
            share: Holds the room that the object takes. The caller frees it, whatever comes of this.

        Raises:
            RequestError: not allowed, not there, too large, not what its content type says, or the store is away.
        """
        source = self._source(location, LOCATION)
        form, found = await self._read(source, self._limit, share, partial(form_of, source.key, content_type))
        if isinstance(found, Lines):
            if self._stores.outputs is None:
                message = f"the input {location} is JSON lines, whose results are stored, and this worker has no store"
                raise BadRequest(f"{message} for results (blobs, output_path)", param=LOCATION)
            return found
        read = read_text if form is Form.TEXT else read_value
        try:
            if len(found) > PARSE_IN_THREAD_BYTES:
                return await asyncio.to_thread(read, found)
            return read(found)
        except WireError as exc:
            raise BadRequest(f"the input {location} {exc}", param=LOCATION) from exc

    async def pointed(self, location: str, limit: int, share: Share) -> bytes:
        """The object of at most `limit` bytes that a message is only a pointer to. Raises as `body`."""
        _, found = await self._read(self._source(location, None), limit, share, lambda _: Form.JSON)
        return b"" if isinstance(found, Lines) else bytes(found)

    def _source(self, location: str, param: str | None) -> Source:
        store, key = self._stores.resolve(location, param)
        return Source(store, key, location, param)

    async def _read(
        self, source: Source, limit: int, share: Share, form_of: Callable[[str | None], Form]
    ) -> tuple[Form, bytearray | Lines]:
        while True:
            async with self._reads, source.opened() as blob:
                form = form_of(blob.content_type)
                if not blob.size:
                    raise BadRequest(f"{source.location} is empty", param=source.param)
                if form is Form.LINES:
                    return form, Lines(source)
                source.check_size(blob.size, limit)
                if share.try_hold(blob.size):
                    return form, await source.whole(blob, limit)
            # Not while it is open: a store does not wait for as long as an inference may take.
            await share.hold(blob.size)
