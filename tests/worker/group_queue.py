"""A queue with ordering keys, in this process: holds a key back while a message of it is in flight, or does not."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from rejoinder.adapters import AdapterError, Backlog, LeaseLost, Message, Transient


@dataclass(eq=False)
class Entry:
    number: int
    key: str | None
    body: bytes
    due: float = 0.0
    attempt: int = 0
    gone: bool = False


@dataclass(frozen=True)
class Event:
    """`what` happened to a delivery: received, acked, let go (a lease of 0 or a delay)."""

    what: str
    number: int
    key: str | None
    attempt: int


@dataclass
class GroupQueue:
    """A `Subscription`.

    Args:
        hold_back: As SQS FIFO queues do: while any message of a key is leased or delayed, no other of it is received.
        counts: Whether deliveries have an `attempt`.
    """

    hold_back: bool = True
    counts: bool = True
    lease_seconds: float = 0.6
    max_attempts: int | None = None
    max_receive: int = 10
    max_lease_seconds: float = 1000.0
    max_hold_seconds: float = math.inf
    keeps_order: bool = True
    name: str = "groups"
    entries: list[Entry] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    ack_failures: list[int] = field(default_factory=list)
    """Numbers of messages whose next ack is answered Transient."""

    def send(self, key: str | None, body: bytes) -> int:
        self.entries.append(Entry(len(self.entries), key, body))
        return len(self.entries) - 1

    def lapse(self, number: int) -> None:
        """End the lease of a message now, as if it had run out."""
        self.entries[number].due = 0.0

    @property
    def left(self) -> int:
        return sum(not entry.gone for entry in self.entries)

    async def receive(self, limit: int, wait: float) -> list[Message]:
        assert 1 <= limit <= self.max_receive
        deadline = time.monotonic() + wait
        while not (taken := self._take(limit)) and time.monotonic() < deadline:
            await asyncio.sleep(0.002)
        return taken

    def _take(self, limit: int) -> list[Message]:
        now = time.monotonic()
        blocked = {entry.key for entry in self.entries if not entry.gone and entry.due > now and entry.key}
        taken = []
        for entry in self.entries:
            if entry.gone or entry.due > now or (self.hold_back and entry.key in blocked) or len(taken) == limit:
                continue
            if self.max_attempts is not None and entry.attempt >= self.max_attempts:
                entry.gone = True  # to the dead letters
                continue
            entry.attempt += 1
            entry.due = now + self.lease_seconds
            self._note("received", entry)
            attempt = entry.attempt if self.counts else None
            lease = (entry, entry.attempt)
            taken.append(Message(str(entry.number), entry.body, {}, attempt, None, lease, entry.key))
        return taken

    def _note(self, what: str, entry: Entry) -> None:
        self.events.append(Event(what, entry.number, entry.key, entry.attempt))

    def _ours(self, message: Message) -> Entry | None:
        entry, attempt = cast("tuple[Entry, int]", message.lease)
        return None if entry.gone or entry.attempt != attempt else entry

    async def ack(self, messages: Sequence[Message]) -> list[AdapterError | None]:
        await asyncio.sleep(0)
        return [self._ack(message) for message in messages]

    def _ack(self, message: Message) -> AdapterError | None:
        entry = self._ours(message)
        if entry is None:
            return LeaseLost("taken")
        if entry.number in self.ack_failures:
            self.ack_failures.remove(entry.number)
            return Transient("busy")
        entry.gone = True
        self._note("acked", entry)
        return None

    async def set_lease(self, messages: Sequence[Message], seconds: float) -> list[AdapterError | None]:
        await asyncio.sleep(0)
        return [self._set(message, seconds) for message in messages]

    def _set(self, message: Message, seconds: float) -> AdapterError | None:
        entry = self._ours(message)
        if entry is None:
            return LeaseLost("taken")
        entry.due = time.monotonic() + seconds
        if seconds != self.lease_seconds:
            self._note("let go", entry)
        return None

    async def backlog(self) -> Backlog:
        return Backlog(self.left, 0)


def opener(thing: Any) -> Any:
    """What stands in for `open_subscription`: opens `thing`, whatever the URL."""

    @contextlib.asynccontextmanager
    async def opened(_url: str) -> AsyncIterator[Any]:
        yield thing

    return opened
