"""Cancelling: the marks that senders leave for requests, and the work that ends for them.

While something is held the marks are listed each second. What of it is marked, and has no answer yet, ends with
`Cancelled` at whatever it does or waits for; what is begun later and is marked does not begin. A mark is removed after
the ack of its request. Whatever goes wrong with the store of marks, requests go on.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Mapping
from contextlib import aclosing
from itertools import islice
from types import TracebackType

import structlog

from rejoinder.adapters import AdapterError, BlobStore, Message, Transient
from rejoinder.adapters.cancel_marks import mark_key
from rejoinder.worker.errors import Cancelled
from rejoinder.worker.handler import Answer, Job
from rejoinder.worker.limits import Limit
from rejoinder.worker.logs import places
from rejoinder.worker.retry import bounded, call_until

log = structlog.get_logger(__name__)

EVERY = 1.0
"""Seconds from the beginning of one listing to that of the next."""
SLOW = 5.0
"""After a listing that took longer than half of that, there is none for as long as it took, or this."""
DENIED_EVERY = 30.0
"""The same after a refusal for good, which somebody may cure while the worker runs."""
SKEW = 60.0
"""A mark of an `inference_id` is for what was sent before it, by clocks that may differ by this much. So one that came
too late for its request is none for a later one with the same `inference_id`."""
LINGER = 3.0
"""Seconds that the mark of an `inference_id` stays after the ack: other workers may hold requests that share it."""
OLD = 32 * 86_400.0
"""The age of marks whose requests will not come any more: Pub/Sub keeps a message for 31 days at most, SQS for 14."""
SWEPT = 10
"""Old marks that one listing removes at most."""
REMOVALS = 16
"""Calls at once."""
REMOVE_LIMIT = 60.0
"""Seconds after which a mark is left to its age."""
LAST_SECONDS = 3.0
"""The same for all that are being removed when the worker ends."""


class Stop(Limit):
    """A block of a task that a mark ends with `Cancelled`."""

    __slots__ = ("_cancels", "_job", "_message")

    def __init__(self, cancels: "Cancels", message: Message, job: Job) -> None:
        super().__init__(cancels, math.inf)
        self._cancels = cancels
        self._message = message
        self._job = job

    def marked(self, marks: Mapping[str, float]) -> bool:
        """Whether one of these is for its request."""
        own, *shared = _names(self._message, self._job)
        sent_at = self._message.sent_at
        # Nobody knows a message's id before it is sent, so clocks have no say in its mark.
        if own in marks:
            return True
        # Of what was listed before a pause, others may have removed this one, whose id is free for another request.
        if sent_at is None and self._cancels.paused:
            return False
        return any(_is_for(marks.get(name), sent_at) for name in shared)

    def __enter__(self) -> "Stop":
        if (marks := self._cancels.marks) and self.marked(marks):
            raise _cancelled()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, exc, traceback)
        except TimeoutError:
            raise _cancelled() from exc


class Cancels:
    """The marks of one store, and what they end.

    Args:
        store: The marks.
    """

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self.marks: dict[str, float] = {}
        """What the last listing found, and when each was made."""
        self.paused = False
        """Whether nothing has been listed since nothing was held."""
        self._running: dict[Limit, None] = {}
        self._begun = asyncio.Event()
        self._clock = asyncio.get_running_loop().time
        self._removing: dict[str, asyncio.Task[None]] = {}
        self._removed: set[str] = set()
        """Since the listing that is under way began."""
        self._calls = asyncio.Semaphore(REMOVALS)
        self._ending = asyncio.Event()
        self._trouble: dict[str, str] = {}

    # ------------------------------------------------------------------ what can be ended

    def stop(self, message: Message, job: Job) -> Stop:
        """A context manager whose block, which makes a request's answer, a mark ends. Raises Cancelled."""
        return Stop(self, message, job)

    def add(self, limit: Limit) -> None:
        """See `Limits.add`."""
        # Found by its names only when there are marks: nearly all requests come and go without any.
        if not self._running:
            self._begun.set()
        self._running[limit] = None

    def discard(self, limit: Limit) -> None:
        """See `Limits.discard`."""
        del self._running[limit]

    # ------------------------------------------------------------------ looking for marks

    async def run(self) -> None:
        """Look for marks while something is held, until cancelled."""
        while True:
            await self._begun.wait()
            began = self._clock()
            pause = await self._look()
            took = self._clock() - began
            await asyncio.sleep(max(pause - took, min(took, SLOW)))
            if not self._running:
                self._begun.clear()
                # The marks stay: an attempt that fails sooner than a listing ends would find none at the next, either.
                self.paused = True

    async def _look(self) -> float:
        """End what is marked. Returns after how many seconds to look again."""
        self._removed.clear()
        try:
            found = await bounded(self._listed())
        except Exception as exc:  # noqa: BLE001 - whatever it is, requests go on
            self._failed("list", exc)
            return EVERY if isinstance(exc, Transient) else DENIED_EVERY
        self._worked("list")
        for name in self._removed:
            found.pop(name, None)
        self.marks, self.paused = found, False
        running = self._running if found else ()
        marked = [one for one in running if isinstance(one, Stop) and not one.expired and one.marked(found)]
        for one in marked:
            one.expire()
        if marked:
            log.info("requests_cancelled", requests=len(marked))
        oldest = time.time() - OLD
        for name in list(islice((name for name, made in found.items() if made < oldest), SWEPT)):
            self._remove(name, 0.0)
        return EVERY

    async def _listed(self) -> dict[str, float]:
        async with aclosing(self._store.list()) as marks:
            return {mark.key: mark.modified async for mark in marks}

    # ------------------------------------------------------------------ marks that are done with

    def settled(self, message: Message, answer: Answer, job: Job | None) -> None:
        """Remove the marks of a message, if it has any: it was acked, and its request was answered so."""
        if self.marks or answer.status_code == Cancelled.status_code:
            self._settled(message, answer, job)
        for other in answer.also:
            self.settled(message, other.answer, other.job)

    def _settled(self, message: Message, answer: Answer, job: Job | None) -> None:
        own, *shared = _names(message, job)
        # What was cancelled has a mark, even where the last listing is forgotten by now.
        cancelled = answer.status_code == Cancelled.status_code
        if cancelled or own in self.marks:
            self._remove(own, 0.0)
        for name in shared:
            if cancelled or _is_for(self.marks.get(name), message.sent_at):
                self._remove(name, LINGER)

    def _remove(self, name: str, linger: float) -> None:
        if name not in self._removing:
            self._removing[name] = asyncio.create_task(self._remove_after(name, linger))

    async def _remove_after(self, name: str, linger: float) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(linger):
                    await self._ending.wait()
            async with self._calls:
                await call_until("remove cancel mark", lambda: bounded(self._store.remove(name)), limit=REMOVE_LIMIT)
            self.marks.pop(name, None)
            self._removed.add(name)
            self._worked("remove")
        except Exception as exc:  # noqa: BLE001 - what it is for has been answered
            self._failed("remove", exc)
        finally:
            del self._removing[name]

    async def close(self) -> None:
        """Remove what is to be removed, for a little while. Nothing is held any more."""
        self._ending.set()
        if self._removing:
            _, late = await asyncio.wait(self._removing.values(), timeout=LAST_SECONDS)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    # ------------------------------------------------------------------ what goes wrong

    def _failed(self, call: str, exc: Exception) -> None:
        """Say once what is wrong with a kind of call, and again only when something else is."""
        kind = type(exc).__name__
        if self._trouble.get(call) == kind:
            return
        self._trouble[call] = kind
        error = {"error": str(exc)} if isinstance(exc, AdapterError) else {"where": places(exc)}
        log.warning("cancel_marks_trouble", call=call, store=self._store.url, error_type=kind, **error)

    def _worked(self, call: str) -> None:
        if self._trouble.pop(call, None) is not None:
            log.info("cancel_marks_again", call=call, store=self._store.url)


def _names(message: Message, job: Job | None) -> tuple[str, ...]:
    """What marks of a request are called: of its message, and of its `inference_id` if it has one."""
    inference_id = None if job is None else job.options.inference_id
    own = mark_key(message.id)
    return (own,) if inference_id is None else (own, mark_key(inference_id))


def _is_for(made: float | None, sent_at: float | None) -> bool:
    """Whether a mark of this age, if there is one, is for a request that was sent then."""
    return made is not None and (sent_at is None or sent_at <= made + SKEW)


def _cancelled() -> Cancelled:
    return Cancelled("the request was cancelled by its sender")
