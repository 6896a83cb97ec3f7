"""URLs name everything: a scheme picks the adapter, which is imported only then."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import import_module
from types import ModuleType
from typing import Protocol, cast
from urllib.parse import SplitResult, parse_qsl, urlsplit

from rejoinder.adapters.checkup import Checkup, CheckupModule
from rejoinder.adapters.driver import BlobStore, Subscription, Topic
from rejoinder.adapters.errors import BadURL

# scheme -> its module (an `AdapterModule`), and the extra of this distribution that brings its SDK
ADAPTERS: Mapping[str, tuple[str, str | None]] = {
    "awssns": ("rejoinder.adapters.sns", "aws"),
    "awssqs": ("rejoinder.adapters.sqs", "aws"),
    "gcppubsub": ("rejoinder.adapters.pubsub", "gcp"),
    "memory": ("rejoinder.adapters.memory", None),
    "sqlite": ("rejoinder.adapters.sqlite", None),
}
STORES: Mapping[str, tuple[str, str | None]] = {
    "file": ("rejoinder.adapters.file_store", None),
    "gs": ("rejoinder.adapters.gcs_store", "gcp"),
    "memory": ("rejoinder.adapters.memory_store", None),
    "s3": ("rejoinder.adapters.s3_store", "aws"),
}
"""The same for stores, whose modules are `StoreModule`s."""


class AdapterModule(Protocol):
    """What an adapter's module offers to this one."""

    def open_subscription(self, url: str, /) -> AbstractAsyncContextManager[Subscription]:
        """Open the queue or subscription that `url` names."""

    def open_topic(self, url: str, /) -> AbstractAsyncContextManager[Topic]:
        """Open the queue or topic that `url` names."""


class StoreModule(Protocol):
    """What a store's module offers to this one."""

    def open_blobs(self, url: str, /) -> AbstractAsyncContextManager[BlobStore]:
        """Open the store that `url` names."""


def _adapter(url: str) -> AdapterModule:
    return cast("AdapterModule", _module(url, ADAPTERS))


def _checkup(url: str) -> CheckupModule:
    return cast("CheckupModule", _module(url, ADAPTERS, "_checkup"))


def _module(url: str, modules: Mapping[str, tuple[str, str | None]], suffix: str = "") -> ModuleType:
    scheme, sep, _ = url.partition("://")
    if not sep or scheme not in modules:
        known = ", ".join(f"{name}://" for name in modules)
        raise BadURL(f"cannot open {url!r}: unknown scheme {scheme!r}; known are {known}")
    module, extra = modules[scheme]
    try:
        return import_module(module + suffix)
    except ModuleNotFoundError as exc:
        if extra is None or (exc.name or "").startswith("rejoinder"):
            raise
        raise BadURL(f"cannot open {url!r}: {scheme}:// needs {exc.name}: pip install 'rejoinder[{extra}]'") from exc


@asynccontextmanager
async def open_subscription(url: str) -> AsyncIterator[Subscription]:
    """Open the queue or subscription that `url` names, and close it on exit.

    Raises:
        BadURL: unknown scheme, unknown or repeated query parameter, or a value out of range; names which.
        NotFound, Denied, Transient: the broker says so.
    """
    async with _adapter(url).open_subscription(url) as subscription:
        yield subscription


@asynccontextmanager
async def open_topic(url: str) -> AsyncIterator[Topic]:
    """Open the queue or topic that `url` names, and close it on exit. Raises as `open_subscription` does."""
    async with _adapter(url).open_topic(url) as topic:
        yield topic


@asynccontextmanager
async def open_blobs(url: str) -> AsyncIterator[BlobStore]:
    """Open the store that `url` names, and close it on exit. Whether it is there, its first use shows.

    Raises:
        BadURL: as `open_subscription`.
        Denied, Transient: the credentials cannot be found or read.
    """
    async with cast("StoreModule", _module(url, STORES)).open_blobs(url) as store:
        yield store


async def check_subscription(url: str) -> Checkup:
    """Look at the queue or subscription that `url` names, without touching a message.

    Raises:
        BadURL: as `open_subscription`. Everything else is a finding.
    """
    return await _checkup(url).check_subscription(url)


async def check_topic(url: str) -> Checkup:
    """Look at the queue or topic that `url` names, without touching a message. Raises as `check_subscription`."""
    return await _checkup(url).check_topic(url)


def split(url: str, allowed: Mapping[str, str]) -> tuple[SplitResult, dict[str, str]]:
    """Split `url` into its parts and its query, whose parameters must be among `allowed` (name -> what it means).

    Raises:
        BadURL: a parameter is unknown, repeated or without a value, or the URL has a fragment.
    """
    try:
        parts = urlsplit(url)
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as exc:
        raise BadURL(f"cannot read {url!r}: {exc}") from exc
    if parts.fragment:
        raise BadURL(f"cannot read {url!r}: a fragment ({'#' + parts.fragment!r}) has no meaning here")
    query: dict[str, str] = {}
    for name, value in pairs:
        if name not in allowed:
            known = "; ".join(f"{key} ({meaning})" for key, meaning in allowed.items())
            raise BadURL(f"unknown parameter {name!r} in {url!r}; known are {known}")
        if name in query:
            raise BadURL(f"parameter {name!r} stands twice in {url!r}")
        if not value:
            raise BadURL(f"parameter {name!r} has no value in {url!r}")
        query[name] = value
    return parts, query


def number(url: str, query: Mapping[str, str], name: str, default: float, *, low: float, high: float) -> float:
    """Read the number `name` from `query`, which must be from `low` to `high`.

    Raises:
        BadURL: it is no number or out of range.
    """
    text = query.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise BadURL(f"parameter {name!r} must be a number from {low:g} to {high:g} in {url!r}, not {text!r}")
    return value


def integer(url: str, query: Mapping[str, str], name: str, default: int, *, low: int, high: int) -> int:
    """Read the whole number `name` from `query`, which must be from `low` to `high`.

    Raises:
        BadURL: it is no whole number (in plain digits) or out of range.
    """
    text = query.get(name)
    if text is None:
        return default
    # isdecimal alone also takes other scripts' digits; the length keeps int() from a text of megabytes
    if not (text.isascii() and text.isdecimal() and len(text) <= 18 and low <= int(text) <= high):
        raise BadURL(f"parameter {name!r} must be a whole number from {low} to {high} in {url!r}, not {text!r}")
    return int(text)
