"""`memory://name`: a queue inside this process, for tests and trials. It expires leases and redelivers like the others.

A queue is shared by everything in the process that opens its name, on any event loop and thread, and lives as long as
the process: closing and reopening finds what was there. `fresh_url` gives a name that nobody else has.

    memory://name?lease=30&max_attempts=5&dead_letter=NAME

Leases run on the monotonic clock. Nothing survives the process.
"""

import asyncio
import heapq
import math
import threading
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import cast
from urllib.parse import quote, unquote

from rejoinder.adapters.driver import Backlog, Message, Outgoing
from rejoinder.adapters.embedded import (
    MAX_BODY,
    MAX_KEYS,
    MAX_LEASE,
    MAX_RECEIVE,
    OPTIONS,
    RECEIVE_BYTES,
    Options,
    check_seconds,
    checked_limit,
    lease_lost,
    too_large,
)
from rejoinder.adapters.errors import AdapterError, BadURL
from rejoinder.adapters.urls import split


@dataclass(eq=False, slots=True)
class Entry:
    """One message in one queue. Moving it to a dead-letter queue makes another entry, so that old leases miss it."""

    id: str
    seq: int
    body: bytes
    attributes: Mapping[str, str]
    sent_at: float
    attempt: int = 0
    due: float | None = None
    """When it can be received, on the monotonic clock; None for now."""
    gone: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """The handle of one delivery."""

    entry: Entry
    attempt: int


@dataclass(eq=False, slots=True)
class Queue:
    """The messages of one name. Every method is called under `_lock`."""

    token: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    last_seq: int = 0
    entries: dict[int, Entry] = field(default_factory=dict)
    """By `seq`."""
    ready: list[int] = field(default_factory=list)
    """Heap of `seq`; one that is gone or was leased again is skipped when it is met."""
    held: list[tuple[float, int]] = field(default_factory=list)
    """Heap of (due, `seq`); one that is gone or whose due is another by now is skipped when it is met."""
    waiting: set[asyncio.Future[None]] = field(default_factory=set)

    def add(self, body: bytes, attributes: Mapping[str, str], sent_at: float, message_id: str | None = None) -> str:
        """Append a message; `message_id` where it already has one."""
        self.last_seq += 1
        seq = self.last_seq
        entry = Entry(message_id or f"{self.token}-{seq}", seq, body, attributes, sent_at)
        self.entries[seq] = entry
        heapq.heappush(self.ready, seq)
        return entry.id

    def remove(self, entry: Entry) -> None:
        """Take a message out for good."""
        entry.gone = True
        del self.entries[entry.seq]

    def hold(self, entry: Entry, due: float) -> None:
        """Hide a message until `due`."""
        entry.due = due
        heapq.heappush(self.held, (due, entry.seq))

    def tidy(self, options: Options, now: float) -> None:
        """Make available what is due, and move away what has had its last attempt."""
        while self.held and self.held[0][0] <= now:
            due, seq = heapq.heappop(self.held)
            entry = self.entries.get(seq)
            if entry is not None and entry.due == due:
                entry.due = None
                if not self.bury(entry, options):
                    heapq.heappush(self.ready, seq)

    def bury(self, entry: Entry, options: Options) -> bool:
        """Move a message to the dead-letter queue, as it was sent, if it has had its last attempt."""
        if options.max_attempts is None or options.dead_letter is None or entry.attempt < options.max_attempts:
            return False
        self.remove(entry)
        dead = _queue(options.dead_letter)
        dead.add(entry.body, entry.attributes, entry.sent_at, entry.id)
        dead.wake()
        return True

    def take(self, limit: int, options: Options, now: float) -> list[Message]:
        """Lease up to `limit` messages, the oldest first."""
        self.tidy(options, now)
        taken: list[Message] = []
        size = 0
        while self.ready and len(taken) < limit and size < RECEIVE_BYTES:
            entry = self.entries.get(heapq.heappop(self.ready))
            # An opener without a dead-letter policy may have let go a message that has none left under ours.
            if entry is None or entry.due is not None or self.bury(entry, options):
                continue
            entry.attempt += 1
            size += len(entry.body)
            self.hold(entry, now + options.lease)
            lease = Lease(entry, entry.attempt)
            taken.append(Message(entry.id, entry.body, entry.attributes, entry.attempt, entry.sent_at, lease))
        return taken

    def wake(self) -> None:
        """Let every waiting `receive` look again, each on its own loop."""
        for future in self.waiting:
            loop = future.get_loop()
            if not loop.is_closed():  # a loop that was closed over a waiting task has nobody left to wake
                loop.call_soon_threadsafe(_done, future)
        self.waiting.clear()


_lock = threading.Lock()
_queues: dict[str, Queue] = {}


def _queue(name: str) -> Queue:
    return _queues.setdefault(name, Queue())


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def fresh_url(options: str = "") -> str:
    """Return a URL whose queue nobody else has; `options` is its query without the question mark."""
    return f"memory://{uuid.uuid4().hex}" + (f"?{options}" if options else "")


class MemorySubscription:
    """The receiving end of a queue."""

    max_lease_seconds = MAX_LEASE
    max_hold_seconds = math.inf
    max_receive = MAX_RECEIVE
    keeps_order = False

    def __init__(self, queue: str, options: Options) -> None:
        self.name = f"memory://{quote(queue, safe='')}"
        self.lease_seconds = options.lease
        self.max_attempts = options.max_attempts
        self._options = options
        with _lock:
            self._queue = _queue(queue)

    async def receive(self, limit: int, wait: float) -> list[Message]:
        """See `rejoinder.adapters.driver.Subscription.receive`."""
        limit = checked_limit(limit)
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + wait
        # A message is leased and returned without an await between: a cancellation finds none leased.
        while True:
            now = time.monotonic()
            with _lock:
                taken = self._queue.take(limit, self._options, now)
                if taken or now >= deadline:
                    return taken
                future = loop.create_future()
                self._queue.waiting.add(future)
                due = self._queue.held[0][0] if self._queue.held else deadline
            timer = loop.call_later(min(due, deadline, now + 3600) - now, _done, future)
            try:
                await future
            finally:
                timer.cancel()
                with _lock:
                    self._queue.waiting.discard(future)

    async def ack(self, messages: Sequence[Message]) -> list[AdapterError | None]:
        """See `rejoinder.adapters.driver.Subscription.ack`."""
        with _lock:
            return [self._settle(message, None) for message in messages]

    async def set_lease(self, messages: Sequence[Message], seconds: float) -> list[AdapterError | None]:
        """See `rejoinder.adapters.driver.Subscription.set_lease`."""
        check_seconds(seconds)
        now = time.monotonic()
        with _lock:
            outcomes = [self._settle(message, now + seconds) for message in messages]
            self._queue.tidy(self._options, now)
            self._queue.wake()
        return outcomes

    def _settle(self, message: Message, due: float | None) -> AdapterError | None:
        lease = cast("Lease", message.lease)
        if lease.entry.gone or lease.entry.attempt != lease.attempt:
            return lease_lost(message.id, lease.attempt)
        if due is None:
            self._queue.remove(lease.entry)
        else:
            self._queue.hold(lease.entry, due)
        return None

    async def backlog(self) -> Backlog:
        """See `rejoinder.adapters.driver.Subscription.backlog`."""
        with _lock:
            self._queue.tidy(self._options, time.monotonic())
            held = sum(entry.due is not None for entry in self._queue.entries.values())
            dead = None if self._options.dead_letter is None else len(_queue(self._options.dead_letter).entries)
            return Backlog(waiting=len(self._queue.entries) - held, held=held, dead=dead)


class MemoryTopic:
    """The sending end of a queue. Messages are kept in the order of publishing, whatever their ordering key."""

    max_body = MAX_BODY
    max_keys = MAX_KEYS

    def __init__(self, queue: str) -> None:
        self.name = f"memory://{quote(queue, safe='')}"
        with _lock:
            self._queue = _queue(queue)

    async def publish(self, batch: Sequence[Outgoing]) -> list[str | AdapterError]:
        """See `rejoinder.adapters.driver.Topic.publish`."""
        now = time.time()
        refused = [too_large(outgoing) for outgoing in batch]
        with _lock:
            outcomes: list[str | AdapterError] = [
                refusal or self._add(outgoing, now) for outgoing, refusal in zip(batch, refused, strict=True)
            ]
            self._queue.wake()
        return outcomes

    def _add(self, outgoing: Outgoing, now: float) -> str:
        return self._queue.add(outgoing.body, MappingProxyType(dict(outgoing.attributes)), now)


def _parse(url: str) -> tuple[str, Options]:
    parts, query = split(url, OPTIONS)
    queue = unquote(parts.netloc)
    if not queue or parts.path:
        raise BadURL(f"{url!r} must be memory://NAME, without a path")
    return queue, Options.parse(url, query, queue)


@asynccontextmanager
async def open_subscription(url: str) -> AsyncIterator[MemorySubscription]:
    """Open the receiving end of the queue that `url` names. Raises BadURL."""
    yield MemorySubscription(*_parse(url))


@asynccontextmanager
async def open_topic(url: str) -> AsyncIterator[MemoryTopic]:
    """Open the sending end of the queue that `url` names; the options are checked and not used. Raises BadURL."""
    yield MemoryTopic(_parse(url)[0])
