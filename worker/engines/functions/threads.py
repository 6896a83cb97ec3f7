"""Threads for functions that are not async. How many run at once is their callers' to bound."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any

from rejoinder.worker.engines.functions.failures import carried
from rejoinder.worker.errors import Unavailable

STOP_SECONDS = 2.0
"""For calls under way to end when the engine stops. Their threads are daemons: the end of the process ends the rest."""


class Work:
    """One call in a thread."""

    __slots__ = ("call", "cancelled", "ended", "failure", "over", "release")

    def __init__(self, call: Callable[["Work"], Any], release: Callable[[], None] | None) -> None:
        self.call = call
        self.release = release
        self.cancelled = False
        """Nobody waits for its result any more."""
        self.failure: Exception | None = None
        """Raised in place of what the call returns or raises."""
        self.over = False
        self.ended: asyncio.Future[None] | None = None


class Threads:
    """Daemon threads that are made as they are needed, and kept. Its methods are called on the event loop.

    In place of `ThreadPoolExecutor`: that one's threads keep a process from ending, and a call through it takes three
    futures and twice as long.

    Args:
        linger: A cancelled `run` returns only when its call has ended.
    """

    def __init__(self, *, linger: bool = False) -> None:
        self._loop = asyncio.get_running_loop()
        self._linger = linger
        self._queue: queue.SimpleQueue[tuple[Work, asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._threads = 0
        self._busy = 0
        self._lingering: set[Work] = set()
        self._stopping = False
        self._idle = asyncio.Event()

    async def run(
        self, call: Callable[[Work], Any], release: Callable[[], None] | None = None, *, linger: bool | None = None
    ) -> Any:
        """Return what `call` returns in a thread, or raise what it raises (`carried`).

        Args:
            call: Is given the work that it is.
            release: Called on the event loop once the call has ended, however that is.
            linger: In place of the setting for all.

        Raises:
            Unavailable: there can be no further thread now.
        """
        work, future = Work(call, release), self._loop.create_future()
        self._busy += 1
        try:
            if self._busy > self._threads:
                self._start_one()
        except RuntimeError as exc:
            self._leave(work)
            raise Unavailable(f"no thread for the function could be started: {exc}") from exc
        self._queue.put((work, future))
        try:
            return await future
        except asyncio.CancelledError:
            work.cancelled = True
            if self._linger if linger is None else linger:
                await self._end_of(work)
            raise
        finally:
            del future  # it keeps an error, whose traceback keeps this frame

    def _start_one(self) -> None:
        threading.Thread(target=self._serve, name=f"function-{self._threads}", daemon=True).start()
        self._threads += 1

    def _serve(self) -> None:
        while (job := self._queue.get()) is not None:
            work, future = job
            result, error = None, None
            try:
                result = work.call(work)
            except BaseException as exc:  # noqa: BLE001  # the user's code: whatever it is, its caller is told
                error = carried(exc)
            try:
                self._loop.call_soon_threadsafe(self._settle, work, future, result, error)
            except RuntimeError:  # the loop is closed: nobody waits for anything
                return
            del job, work, future, result, error  # nothing of it stays while this thread waits

    def _settle(self, work: Work, future: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
        self._leave(work)
        error = work.failure or error
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def _leave(self, work: Work) -> None:
        self._busy -= 1
        work.over = True
        if work.release is not None:
            work.release()
        if work.ended is not None and not work.ended.done():
            work.ended.set_result(None)
        if not self._busy:
            self._idle.set()

    async def _end_of(self, work: Work) -> None:
        """Wait for the end of a cancelled call, however often the waiting is cancelled too."""
        work.ended = self._loop.create_future()
        self._lingering.add(work)
        while not work.over and not self._stopping:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({work.ended})
        self._lingering.discard(work)

    def close(self) -> None:
        """Let go those who only wait for the end of a cancelled call."""
        self._stopping = True
        for work in self._lingering:
            if work.ended is not None and not work.ended.done():
                work.ended.set_result(None)

    async def stop(self) -> int:
        """End the threads; wait a moment for calls under way. Returns how many go on nonetheless."""
        self.close()
        for _ in range(self._threads):
            self._queue.put(None)
        if self._busy:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    await self._idle.wait()
        return self._busy
