"""What the stores share: what a key is, where a store's URL says it stands, and pieces of one size."""

import asyncio
import hashlib
import io
import re
import unicodedata
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Mapping
from typing import TypeVar

from rejoinder.adapters.errors import BadURL
from rejoinder.adapters.urls import split

T = TypeVar("T")

MAX_KEY = 1024
"""Bytes of UTF-8 in a key, with the store's prefix where the service counts that too: S3's limit, and GCS's."""
# What every store, file system and shell takes as it is. Names that begin with a dot are hidden, or lead elsewhere.
_SAFE = re.compile(r"(?!\.)[A-Za-z0-9_.-]{1,64}")
PIECE = 1 << 20
"""Bytes that are read at once: a step of the event loop, or a trip to a thread."""


def check_key(key: str, prefix: str = "") -> str:
    """Return the object's whole name, `prefix` before it, if `key` is one as `BlobStore` says.

    Raises:
        ValueError: it is not; says why.
    """
    name = f"{prefix}/{key}" if prefix else key
    if fault := _fault(key) or _fault(name):
        raise ValueError(f"not a key: {key!r:.200}: {fault}")
    return name


def key_of(name: str, prefix: str) -> str | None:
    """The key that a listed object's whole name stands for; None where it is none, or not below `prefix`."""
    key = name.removeprefix(f"{prefix}/") if prefix else name
    below = not prefix or len(key) < len(name)
    return key if below and not _fault(key) else None


def object_name(name: str) -> str:
    """A name of anybody's choice as a part of a key: unchanged where it can be, else its SHA-256 in hexadecimal."""
    return name if _SAFE.fullmatch(name) else hashlib.sha256(name.encode()).hexdigest()


def below(url: str, part: str) -> str:
    """The URL of what stands below a store's: its options stay."""
    base, mark, options = url.partition("?")
    return f"{base.removesuffix('/')}/{part}{mark}{options}"


def _fault(key: str) -> str | None:
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        return "it has a lone surrogate, which UTF-8 cannot carry"
    if size > MAX_KEY:
        return f"{size} bytes, with the store's prefix; at most {MAX_KEY} are allowed"
    if any(part in {"", ".", ".."} for part in key.split("/")):
        return "a part between slashes is empty, '.' or '..'"
    if any(unicodedata.category(char) == "Cc" for char in key):
        return "it has a control character"
    return None


def parse(url: str, form: str, options: Mapping[str, str]) -> tuple[str, str, dict[str, str]]:
    """Split a store's URL into its bucket (or host), its prefix without slashes around it, and its options.

    The prefix is taken as it stands, as keys are: `%20` is three characters of it.

    Args:
        url: what was given.
        form: what it must look like, for the error's text.
        options: as `rejoinder.adapters.urls.split` takes them.

    Raises:
        BadURL: an option is wrong, or the prefix could not be the beginning of a key.
    """
    if any(unicodedata.category(char) == "Cc" for char in url):  # urlsplit drops some without a word
        raise BadURL(f"{url!r} must be {form}, without control characters")
    parts, query = split(url, options)
    prefix = parts.path.removeprefix("/").removesuffix("/")
    if prefix and (fault := _fault(prefix)):
        raise BadURL(f"{url!r} must be {form}: {fault}")
    return parts.netloc, prefix, query


async def pieces(chunks: AsyncIterable[bytes], size: int) -> AsyncGenerator[bytes, None]:
    """Cut a stream anew, into pieces of `size` bytes; the last one has the rest. At least one, be it empty."""
    held = io.BytesIO()  # unlike a bytearray, it gives its bytes away without copying them
    first = True
    async for chunk in chunks:
        with memoryview(chunk) as view:
            start = 0
            while held.tell() + len(view) - start >= size:
                end = start + size - held.tell()
                held.write(view[start:end])
                start = end
                piece, held = held.getvalue(), io.BytesIO()
                yield piece
                first = False
            held.write(view[start:])
    if first or held.tell():
        yield held.getvalue()


async def to_its_end(work: Awaitable[T]) -> T:
    """Await `work` to its end however often the caller is cancelled meanwhile, and only then be cancelled."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        _ = task.cancelled() or task.exception()  # seen: it would be reported as never retrieved
        raise cancelled
    return task.result()
