"""Time limits of many calls at once, looked at a few times a second.

A timer of the event loop for each call, which is what `asyncio.timeout` makes, costs as much as reading a small
request.
"""

import asyncio
from types import TracebackType

TICK = 0.1
"""Seconds by which a call may run over its time."""


class Limits:
    """The limits of all calls under way on one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._running: dict[Limit, None] = {}
        self._ticking = False

    def at(self, when: float) -> "Limit":
        """A context manager that ends its block with TimeoutError at `when`, the loop's time."""
        return Limit(self, when)

    def add(self, limit: "Limit") -> None:
        """Watch a limit until `discard`."""
        self._running[limit] = None
        if not self._ticking:
            self._ticking = True
            self._loop.call_later(TICK, self._tick)

    def discard(self, limit: "Limit") -> None:
        """Watch it no more."""
        del self._running[limit]

    def _tick(self) -> None:
        now = self._loop.time()
        for limit in self._running:
            if limit.when <= now:
                limit.expire()
        self._ticking = bool(self._running)
        if self._ticking:
            self._loop.call_later(TICK, self._tick)


class Limit:
    """The limit of one call: as `asyncio.timeout_at`, which it follows in telling its own cancellation from others'."""

    __slots__ = ("_cancelling", "_limits", "_task", "expired", "when")

    def __init__(self, limits: Limits, when: float) -> None:
        self._limits = limits
        self.when = when
        """The loop's time. May be changed while it runs."""
        self.expired = False

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
