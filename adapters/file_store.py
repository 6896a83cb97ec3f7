"""`file:///dir`: a directory of this machine as a store.

The directory, and those that the parts of a key name, are made by the first `put`; reading what is not there is
`NotFound`. An object is a regular file: a directory is no object, and a pipe, socket or device is `Denied`. Symbolic
links inside the directory are followed as long as they lead to somewhere inside, but a listing leaves them out. Content
types are not kept.

A new object has no name while it is written (`O_TMPFILE`), so that a process that is killed leaves nothing. Where a
file system cannot do that, it has a name that no key can have, locked while its writer lives; the next `put` of the
same key removes those that nobody has locked. The file system must have hard links.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from itertools import islice
from typing import ParamSpec, TypeVar

from rejoinder.adapters import blobs
from rejoinder.adapters.driver import Blob, Listed
from rejoinder.adapters.errors import BadURL
from rejoinder.adapters.file_listing import listed
from rejoinder.adapters.file_objects import Place, Reading, Writing

P = ParamSpec("P")
T = TypeVar("T")

LISTED_AT_ONCE = 1000
"""Objects that one trip to a thread lists."""


class FileStore:
    """A directory. Several processes and machines may share it, as far as its file system lets them."""

    def __init__(self, root: str) -> None:
        self.url = f"file://{root}"
        self._root = root

    def location(self, key: str) -> str:
        """See `rejoinder.adapters.driver.BlobStore.location`."""
        return f"{self.url}/{blobs.check_key(key)}"

    @asynccontextmanager
    async def read(self, key: str) -> AsyncIterator[Blob]:
        """See `rejoinder.adapters.driver.BlobStore.read`."""
        reading = Reading(self._place(key))
        try:
            yield Blob(await _thread(reading.open), None, _pieces(reading))
        finally:
            reading.close()

    async def put(self, key: str, chunks: AsyncIterable[bytes], content_type: str) -> bool:  # noqa: ARG002
        """See `rejoinder.adapters.driver.BlobStore.put`."""
        place = self._place(key)
        if await _thread(place.stands):
            return False
        writing = Writing(place)
        try:
            await _thread(writing.open)
            async with aclosing(blobs.pieces(chunks, blobs.PIECE)) as pieces:
                async for piece in pieces:
                    await _thread(writing.write, piece)
            return await _thread(writing.publish)
        finally:
            await _thread(writing.close)

    async def exists(self, key: str) -> bool:
        """See `rejoinder.adapters.driver.BlobStore.exists`."""
        return await _thread(self._place(key).stands)

    async def remove(self, key: str) -> None:
        """See `rejoinder.adapters.driver.BlobStore.remove`."""
        await _thread(self._place(key).remove)

    async def list(self, after: str = "") -> AsyncGenerator[Listed, None]:
        """See `rejoinder.adapters.driver.BlobStore.list`."""
        found = listed(self._root, after)
        try:
            while some := await _thread(lambda: tuple(islice(found, LISTED_AT_ONCE))):
                for one in some:
                    yield one
        finally:
            await _thread(found.close)

    def _place(self, key: str) -> Place:
        return Place(self.location(key), self._root, key)


async def _thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call in a thread, whose end a cancellation waits for: nobody may close what it uses."""
    return await blobs.to_its_end(asyncio.to_thread(call, *args, **kwargs))


async def _pieces(reading: Reading) -> AsyncIterator[bytes]:
    while piece := await _thread(reading.read, blobs.PIECE):
        yield piece


@asynccontextmanager
async def open_blobs(url: str) -> AsyncIterator[FileStore]:
    """Open the directory that `url` names; it need not be there. Raises BadURL."""
    form = "file:///DIRECTORY, with three slashes and an absolute path"
    host, path, _ = blobs.parse(url, form, {})
    if host or not path:
        raise BadURL(f"{url!r} must be {form}")
    yield FileStore(f"/{path}")
