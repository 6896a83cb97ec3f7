"""Time limits of many calls at once, on one timer.

A timer of the event loop for each call, which is what `asyncio.timeout` makes, costs as much as reading a small
request; and nearly all of them end in time.
"""

import asyncio
import math
from types import TracebackType
from typing import Protocol


class Limits:
    """The limits of all calls under way on one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._running: dict[Limit, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf
        """When the timer runs out: at the earliest limit, or before it if that one has ended meanwhile."""

    def at(self, when: float) -> "Limit":
        """A context manager that ends its block with TimeoutError at `when`, the loop's time."""
        return Limit(self, when)

    def add(self, limit: "Limit") -> None:
        """Watch a limit until `discard`. Again: its time has changed."""
        self._running[limit] = None
        if limit.when < self._due:
            self._set(limit.when)

    def discard(self, limit: "Limit") -> None:
        """Watch it no more."""
        del self._running[limit]

    def _set(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = None if due == math.inf else self._loop.call_at(due, self._expire)

    def _expire(self) -> None:
        now = max(self._due, self._loop.time())  # a timer may run out a clock's tick early
        for limit in self._running:
            if limit.when <= now:
                limit.expire()
        self._set(min((limit.when for limit in self._running if not limit.expired), default=math.inf))


class Watch(Protocol):
    """Who ends limits, as `Limits` does when their time has come."""

    def add(self, limit: "Limit", /) -> None:
        """A limit's block is entered."""

    def discard(self, limit: "Limit", /) -> None:
        """It is left."""


class Limit:
    """The limit of one call: as `asyncio.timeout_at`, which it follows in telling its own cancellation from others'."""

    __slots__ = ("_cancelling", "_limits", "_task", "expired", "when")

    def __init__(self, limits: Watch, when: float) -> None:
        self._limits = limits
        self.when = when
        self.expired = False

    def reschedule(self, when: float) -> None:
        """Change the time of a limit that is running."""
        self.when = when
        self._limits.add(self)

    def __enter__(self) -> "Limit":
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a limit ends a task: enter it in one")
        self._task = task
        self._cancelling = task.cancelling()
        self._limits.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._limits.discard(self)
        if self.expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from exc

    def expire(self) -> None:
        """Its time has come."""
        if not self.expired:
            self.expired = True
            self._task.cancel()
