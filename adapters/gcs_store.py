"""`gs://bucket/prefix`: a bucket of Google Cloud Storage as a store.

    gs://bucket/prefix?kms_key_name=projects/P/locations/L/keyRings/R/cryptoKeys/K

Credentials are Application Default Credentials; with STORAGE_EMULATOR_HOST set, the emulator there is spoken to,
without any. An object shorter than `PART` is written by one call, a longer one in a resumable session, whose parts
nobody can see or list; both with `ifGenerationMatch=0`. A session that a killed process leaves ends by itself.

Reading needs `storage.objects.get`, and `storage.objects.list`, without which the service says of a missing object that
it is forbidden. Putting needs `storage.objects.create` alone, removing `storage.objects.delete`, and listing
`storage.objects.list`.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Final, ParamSpec, TypeVar

from rejoinder.adapters import blobs
from rejoinder.adapters.driver import Blob, Listed
from rejoinder.adapters.errors import BadURL, NotFound
from rejoinder.adapters.gcs_wire import Download, Stands, Upload, Wire

P = ParamSpec("P")
T = TypeVar("T")

OPTIONS: Mapping[str, str] = {
    "kms_key_name": "name of the Cloud KMS key that new objects are encrypted with; by default as the bucket says",
}
PART: Final = 8 << 20
"""Bytes, a multiple of 256 KiB. Parts of a session follow each other: smaller ones would be more round trips."""
THREADS: Final = 16
PAGE: Final = 1000
"""Objects in one answer to a listing: the service gives no more."""
LIST: Final = "storage.objects.list"
READ: Final = "storage.objects.get (and storage.objects.list, without which a missing object is forbidden)"
CREATE: Final = "storage.objects.create"
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_KEY: Final = re.compile(r"projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+")


class GCSStore:
    """A prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str, kms_key: str | None, wire: Wire, threads: ThreadPoolExecutor) -> None:
        self.url = f"gs://{bucket}/{prefix}".rstrip("/")
        self._prefix = prefix
        self._kms_key = kms_key
        self._wire = wire
        self._threads = threads
        self._bucket_seen = False

    def location(self, key: str) -> str:
        """See `rejoinder.adapters.driver.BlobStore.location`."""
        blobs.check_key(key, self._prefix)
        return f"{self.url}/{key}"

    @asynccontextmanager
    async def read(self, key: str) -> AsyncIterator[Blob]:
        """See `rejoinder.adapters.driver.BlobStore.read`."""
        download = Download(self._wire, blobs.check_key(key, self._prefix), self.location(key))
        try:
            size, content_type = await self._thread(download.open, READ)
            yield Blob(size, content_type, self._pieces(download))
        finally:
            await self._thread(download.close)

    async def _pieces(self, download: Download) -> AsyncIterator[bytes]:
        while piece := await self._thread(download.read, READ, blobs.PIECE):
            yield piece

    async def exists(self, key: str) -> bool:
        """See `rejoinder.adapters.driver.BlobStore.exists`."""
        name, location = blobs.check_key(key, self._prefix), self.location(key)
        try:
            await self._thread(self._wire.describe, READ, location, name)
        except NotFound:
            await self._see_bucket()  # who hears of a missing object may list
            return False
        return True

    async def _see_bucket(self) -> None:
        """Tell a missing object from a missing bucket. Raises NotFound where it is the bucket."""
        if not self._bucket_seen:
            await self._thread(partial(self._wire.page, LIST, self.url, "", None, size=1))
            self._bucket_seen = True

    async def remove(self, key: str) -> None:
        """See `rejoinder.adapters.driver.BlobStore.remove`."""
        name, location = blobs.check_key(key, self._prefix), self.location(key)
        try:
            await self._thread(self._wire.delete, "storage.objects.delete", location, name)
        except NotFound:
            await self._see_bucket()

    async def list(self, after: str = "") -> AsyncGenerator[Listed, None]:
        """See `rejoinder.adapters.driver.BlobStore.list`."""
        prefix = f"{self._prefix}/" if self._prefix else ""
        # The service begins with the name itself, if there is one.
        page = partial(self._wire.page, LIST, self.url, prefix, size=PAGE, start=prefix + after if after else "")
        token: str | None = None
        while True:
            found, token = await self._thread(page, token)
            for name, modified in found:
                if (key := blobs.key_of(name, self._prefix)) is not None and key != after:
                    yield Listed(key, modified)
            if token is None:
                return

    async def put(self, key: str, chunks: AsyncIterable[bytes], content_type: str) -> bool:
        """See `rejoinder.adapters.driver.BlobStore.put`."""
        name, location = blobs.check_key(key, self._prefix), self.location(key)
        upload = Upload(self._wire, name, location, {"contentType": content_type}, self._kms_key)
        try:
            async with aclosing(blobs.pieces(chunks, PART)) as pieces:
                async for piece in pieces:
                    await self._thread(partial(upload.send, CREATE, piece, last=len(piece) < PART))
                    whole = len(piece) == PART
            if whole:
                await self._thread(partial(upload.send, CREATE, b"", last=True))
        except Stands:
            return False
        finally:
            await self._thread(upload.abandon, CREATE)
        return True

    async def _thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call in a thread, whose end a cancellation waits for: what it uses is closed next."""
        loop = asyncio.get_running_loop()
        return await blobs.to_its_end(loop.run_in_executor(self._threads, partial(call, *args, **kwargs)))


def parse(url: str) -> tuple[str, str, dict[str, str]]:
    """Return the bucket, the prefix and the options that `url` names. Raises BadURL."""
    form = "gs://BUCKET/PREFIX"
    bucket, prefix, query = blobs.parse(url, form, OPTIONS)
    if not _BUCKET.fullmatch(bucket):
        raise BadURL(f"{url!r} must be {form}: {bucket!r} is no bucket's name")
    key = query.get("kms_key_name")
    if key is not None and not _KEY.fullmatch(key):
        form = "projects/PROJECT/locations/LOCATION/keyRings/RING/cryptoKeys/KEY"
        raise BadURL(f"parameter 'kms_key_name' must be {form} in {url!r}, not {key!r}")
    return bucket, prefix, query


@asynccontextmanager
async def open_blobs(url: str) -> AsyncIterator[GCSStore]:
    """Open the bucket that `url` names. Whether it is there, its first use shows. Raises BadURL, Denied, Transient."""
    bucket, prefix, query = parse(url)
    wire = await asyncio.to_thread(Wire, bucket)
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="gcs")
    try:
        yield GCSStore(bucket, prefix, query.get("kms_key_name"), wire, threads)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        wire.close()
