"""`sqlite:///relative.db?queue=requests`: queues in one SQLite file, shared by many processes of one machine.

    sqlite:////absolute.db?queue=requests&lease=30&max_attempts=5&dead_letter=requests-dead

Three slashes for a path relative to the working directory, four for an absolute one, as in SQLAlchemy; `%3F` and the
like stand for themselves. The file is created, private to the user, where there is none. It must be on a local disk:
SQLite's locks and shared memory do not cross a network.

A publish or an ack has returned only after an fsync of the file (WAL, `synchronous = FULL`). A message's id is the
file's random id and a number that the file never gives twice. The file keeps its largest size: freed pages are reused.
Messages are received in the order of publishing, whatever their ordering key; a redelivered one comes late.
"""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import quote, unquote

from rejoinder.adapters.driver import Backlog, Message, Outgoing
from rejoinder.adapters.embedded import (
    MAX_BODY,
    MAX_KEYS,
    MAX_LEASE,
    MAX_RECEIVE,
    OPTIONS,
    Options,
    check_seconds,
    checked_limit,
    too_large,
)
from rejoinder.adapters.errors import AdapterError, BadURL
from rejoinder.adapters.sqlite_operations import CountBacklog, Lease, Publish, Receive, Settle
from rejoinder.adapters.sqlite_shared import OpenFile, shared_file
from rejoinder.adapters.urls import split

PARAMETERS = {"queue": "name of the queue in the file, required", **OPTIONS}


class SqliteSubscription:
    """The receiving end of a queue in a file."""

    max_lease_seconds = MAX_LEASE
    max_hold_seconds = math.inf
    max_receive = MAX_RECEIVE
    keeps_order = False

    def __init__(self, file: OpenFile, queue: str, options: Options) -> None:
        self.name = _name(file, queue)
        self.lease_seconds = options.lease
        self.max_attempts = options.max_attempts
        self._file = file
        self._queue = queue
        self._options = options

    async def receive(self, limit: int, wait: float) -> list[Message]:
        """See `rejoinder.adapters.driver.Subscription.receive`."""
        limit = checked_limit(limit)
        let_go = self._file.thread.let_go
        operation = Receive(self._queue, self._options, limit, wait, owner=self._file, let_go=let_go)
        try:
            return await self._file.call(operation)
        except asyncio.CancelledError:
            # A future that was cancelled abandons its operation itself; one that was resolved just before, here.
            if operation.future.done() and not operation.future.cancelled():
                operation.abandon()
            raise

    async def ack(self, messages: Sequence[Message]) -> list[AdapterError | None]:
        """See `rejoinder.adapters.driver.Subscription.ack`."""
        return await self._settle(messages, None)

    async def set_lease(self, messages: Sequence[Message], seconds: float) -> list[AdapterError | None]:
        """See `rejoinder.adapters.driver.Subscription.set_lease`."""
        check_seconds(seconds)
        return await self._settle(messages, seconds)

    async def _settle(self, messages: Sequence[Message], seconds: float | None) -> list[AdapterError | None]:
        if not messages:
            return []
        leases = [cast("Lease", message.lease) for message in messages]
        try:
            return await self._file.call(Settle(leases, seconds, self._options))
        except AdapterError as exc:
            return [exc] * len(messages)

    async def backlog(self) -> Backlog:
        """See `rejoinder.adapters.driver.Subscription.backlog`."""
        return await self._file.call(CountBacklog(self._queue, self._options))


class SqliteTopic:
    """The sending end of a queue in a file."""

    max_body = MAX_BODY
    max_keys = MAX_KEYS

    def __init__(self, file: OpenFile, queue: str) -> None:
        self.name = _name(file, queue)
        self._file = file
        self._queue = queue

    async def publish(self, batch: Sequence[Outgoing]) -> list[str | AdapterError]:
        """See `rejoinder.adapters.driver.Topic.publish`."""
        refused = [too_large(outgoing) for outgoing in batch]
        rows = [
            (json.dumps(dict(outgoing.attributes)) if outgoing.attributes else "{}", outgoing.body)
            for outgoing, refusal in zip(batch, refused, strict=True)
            if refusal is None
        ]
        if not rows:
            return [refusal for refusal in refused if refusal is not None]
        try:
            published = await self._file.call(Publish(self._queue, rows))
        except AdapterError as exc:
            return [refusal or exc for refusal in refused]
        ids = iter(published)
        return [refusal or next(ids) for refusal in refused]


@dataclass(frozen=True, slots=True)
class Location:
    """What a URL names."""

    path: Path
    queue: str
    options: Options

    @classmethod
    def parse(cls, url: str) -> "Location":
        """Read `url`. Raises BadURL."""
        parts, query = split(url, PARAMETERS)
        path = unquote(parts.path)[1:]
        if parts.netloc or not path or path.endswith("/") or "\0" in path:
            raise BadURL(f"{url!r} must be sqlite:///RELATIVE.db?queue=NAME or sqlite:////ABSOLUTE.db?queue=NAME")
        if path == ":memory:":
            raise BadURL(f"{url!r} is not shared by anybody; memory://NAME is the queue without a file")
        if "queue" not in query:
            raise BadURL(f"parameter 'queue' is missing in {url!r}: which queue of the file?")
        return cls(Path(path), query["queue"], Options.parse(url, query, query["queue"]))


def _name(file: OpenFile, queue: str) -> str:
    # The file's own id: the same under every path, mount and working directory, and another for another file.
    return f"sqlite:{file.file_id}?queue={quote(queue, safe='')}"


@asynccontextmanager
async def open_subscription(url: str) -> AsyncIterator[SqliteSubscription]:
    """Open the receiving end of the queue that `url` names.

    Raises:
        BadURL: as its message says.
        NotFound, Denied, Transient, AdapterError: as `rejoinder.adapters.sqlite_file.open_database`.
    """
    location = Location.parse(url)
    async with shared_file(location.path.resolve()) as file:
        yield SqliteSubscription(file, location.queue, location.options)


@asynccontextmanager
async def open_topic(url: str) -> AsyncIterator[SqliteTopic]:
    """Open the sending end of the queue that `url` names; all options are checked, and only `queue` is used.

    Raises as `open_subscription`.
    """
    location = Location.parse(url)
    async with shared_file(location.path.resolve()) as file:
        yield SqliteTopic(file, location.queue)
