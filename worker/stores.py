"""The stores that the settings name, opened once, and which of them an input may be read from."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from urllib.parse import unquote

from rejoinder.adapters import open_blobs
from rejoinder.adapters.blobs import below
from rejoinder.adapters.cancel_marks import marks_url
from rejoinder.adapters.driver import BlobStore
from rejoinder.worker.errors import Forbidden
from rejoinder.worker.settings import Settings

LOOKED_FOR = "rejoinder-looks-whether-the-store-answers"
"""A key that no object has."""


@dataclass(frozen=True, slots=True)
class Stores:
    """The worker's stores. None: the settings name none for that."""

    outputs: BlobStore | None = None
    failures: BlobStore | None = None
    ledger: BlobStore | None = None
    responses: BlobStore | None = None
    """Of responses that go as the Extended Client's pointers."""
    inputs: tuple[BlobStore, ...] = ()
    """What inputs may be read from."""
    cancels: BlobStore | None = None
    """The cancel marks. Not among what must be there: requests are answered without it."""

    @property
    def written(self) -> tuple[BlobStore, ...]:
        """What the worker writes to, each once."""
        named = (self.outputs, self.failures, self.ledger, self.responses)
        return tuple(dict.fromkeys(store for store in named if store is not None))

    async def look(self) -> None:
        """Find out whether the stores that are written to are there, and what is in them may be asked for.

        Raises:
            AdapterError: one is not, or refuses.
        """
        for store in self.written:
            await store.exists(LOOKED_FOR)

    def is_own(self, location: str) -> bool:
        """Whether an object is one that the worker writes: nothing nearer to it is what inputs are read from."""
        marks = () if self.cancels is None else (self.cancels,)
        written = _nearest(location, (*self.written, *marks))
        return written > 0 and written >= _nearest(location, self.inputs)

    def resolve(self, location: str, param: str | None) -> tuple[BlobStore, str]:
        """The store and the key of an object that may be read. Asks no server.

        Args:
            location: What a message names. Taken as it stands: nothing in it is decoded or normalised.
            param: The field that names it, for the error.

        Raises:
            Forbidden: it is outside the allowed stores.
        """
        named = f"{param or 'the pointer'} {location!r:.1100}"
        for store in self.inputs:
            base = f"{store.url}/"
            if location.startswith(base):
                key = location.removeprefix(base)
                try:
                    store.location(key)
                    _no_way_out(key)
                except ValueError as exc:
                    raise Forbidden(f"{named} is not allowed: {exc}", param=param) from exc
                return store, key
        allowed = ", ".join(store.url for store in self.inputs) or "no store"
        raise Forbidden(f"{named} is not allowed: this worker reads from {allowed}", param=param)


def _nearest(location: str, stores: tuple[BlobStore, ...]) -> int:
    """How long the longest URL is of the stores that a location is below; 0: it is below none."""
    return max((len(store.url) for store in stores if location.startswith(f"{store.url}/")), default=0)


def _no_way_out(key: str) -> None:
    """Raise ValueError for a key that leads upwards for whoever decodes it, such as a proxy before the store."""
    if any(part in {".", ".."} for part in unquote(key).replace("\\", "/").split("/")):
        raise ValueError("decoded, a part of its path is '.' or '..'")


@asynccontextmanager
async def open_stores(settings: Settings) -> AsyncIterator[Stores]:
    """Open what the settings name, each URL once, and close it on exit.

    Raises:
        AdapterError: a URL is wrong, or a store refuses; says which.
    """
    opened: dict[str, BlobStore] = {}
    blobs = settings.blobs
    async with AsyncExitStack() as stack:

        async def at(url: str | None, part: str = "") -> BlobStore | None:
            """The store at `url`, or else, where a `part` is given, the one below the store for all."""
            if url is None:
                if blobs is None or not part:
                    return None
                url = below(blobs, part)
            if url not in opened:
                opened[url] = await stack.enter_async_context(open_blobs(url))
            return opened[url]

        inputs = [await at(url) for url in (blobs, *settings.allow_input)]
        yield Stores(
            outputs=await at(settings.output_path, "outputs"),
            failures=await at(settings.failure_path, "failures"),
            ledger=await at(settings.ledger),
            responses=await at(None, "responses") if settings.extended_client else None,
            inputs=tuple(store for store in inputs if store is not None),
            cancels=await at(marks_url(settings.requests, settings.cancels, blobs)),
        )
