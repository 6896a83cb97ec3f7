"""`memory://name/prefix`: a store inside this process, for tests and trials.

It is shared by everything in the process that opens its name, on any event loop and thread, and lives as long as the
process. The queues of `memory://` are another matter: a store and a queue of one name know nothing of each other.
"""

import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager

from rejoinder.adapters import blobs
from rejoinder.adapters.driver import Blob, Listed
from rejoinder.adapters.errors import BadURL, NotFound

_lock = threading.Lock()
_stores: defaultdict[str, dict[str, tuple[bytes, str, float]]] = defaultdict(dict)


class MemoryStore:
    """Objects in a dictionary. Each is held whole, and so is what is being put."""

    def __init__(self, store: str, prefix: str) -> None:
        self.url = f"memory://{store}/{prefix}".rstrip("/")
        self._prefix = prefix
        with _lock:
            self._objects = _stores[store]

    def location(self, key: str) -> str:
        """See `rejoinder.adapters.driver.BlobStore.location`."""
        blobs.check_key(key, self._prefix)
        return f"{self.url}/{key}"

    @asynccontextmanager
    async def read(self, key: str) -> AsyncIterator[Blob]:
        """See `rejoinder.adapters.driver.BlobStore.read`."""
        found = self._objects.get(blobs.check_key(key, self._prefix))
        if found is None:
            raise NotFound(f"there is no {self.location(key)}")
        content, content_type, _ = found
        yield Blob(len(content), content_type, _pieces(content))

    async def put(self, key: str, chunks: AsyncIterable[bytes], content_type: str) -> bool:
        """See `rejoinder.adapters.driver.BlobStore.put`."""
        name = blobs.check_key(key, self._prefix)
        if name in self._objects:
            return False
        content = b"".join([chunk async for chunk in chunks])
        with _lock:
            return self._objects.setdefault(name, stored := (content, content_type, time.time())) is stored

    async def exists(self, key: str) -> bool:
        """See `rejoinder.adapters.driver.BlobStore.exists`."""
        return blobs.check_key(key, self._prefix) in self._objects

    async def remove(self, key: str) -> None:
        """See `rejoinder.adapters.driver.BlobStore.remove`."""
        with _lock:
            self._objects.pop(blobs.check_key(key, self._prefix), None)

    async def list(self, after: str = "") -> AsyncGenerator[Listed, None]:
        """See `rejoinder.adapters.driver.BlobStore.list`."""
        with _lock:
            objects = [(name, modified) for name, (_, _, modified) in self._objects.items()]
        for name, modified in objects:
            if (key := blobs.key_of(name, self._prefix)) is not None and key > after:
                yield Listed(key, modified)


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), blobs.PIECE):
        yield content[start : start + blobs.PIECE]


@asynccontextmanager
async def open_blobs(url: str) -> AsyncIterator[MemoryStore]:
    """Open the store that `url` names. Raises BadURL."""
    store, prefix, _ = blobs.parse(url, "memory://NAME/PREFIX", {})
    if not store:
        raise BadURL(f"{url!r} must be memory://NAME/PREFIX")
    yield MemoryStore(store, prefix)
