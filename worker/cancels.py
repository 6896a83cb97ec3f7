"""Cancelling: the marks that senders leave for requests, and the work that ends for them.

While something is held, `Marks` looks for new ones each second. What of it is marked, and has no answer yet, ends with
`Cancelled` at whatever it does or waits for; what is begun later and is marked does not begin. A mark is removed after
the ack of its request.
"""

import asyncio
import math
from types import TracebackType

import structlog

from rejoinder.adapters import BlobStore, Message
from rejoinder.adapters.cancel_marks import mark_name
from rejoinder.adapters.driver import Listed
from rejoinder.worker.errors import Cancelled
from rejoinder.worker.handler import Answer, Job
from rejoinder.worker.limits import Limit
from rejoinder.worker.marks import Marks

log = structlog.get_logger(__name__)

SLOW = 5.0
"""After a listing that took longer than half of that, there is none for as long as it took, or this."""
SKEW = 60.0
"""A mark of an `inference_id` is for what was sent before it, by clocks that may differ by this much. So one that came
too late for its request is none for a later one with the same `inference_id`."""
LINGER = 3.0
"""Seconds that the mark of an `inference_id` stays after the ack: other workers may hold requests that share it."""


class Stop(Limit):
    """A block of a task that a mark ends with `Cancelled`."""

    __slots__ = ("_cancels", "_job", "_message")

    def __init__(self, cancels: "Cancels", message: Message, job: Job) -> None:
        super().__init__(cancels, math.inf)
        self._cancels = cancels
        self._message = message
        self._job = job

    def marked(self) -> bool:
        """Whether a known mark is for its request."""
        marks = self._cancels.marks
        own, *shared = _names(self._message, self._job)
        sent_at = self._message.sent_at
        # Nobody knows a message's id before it is sent, so clocks have no say in its mark.
        if own in marks.known:
            return True
        # Of what was listed before a pause, others may have removed this one, whose id is free for another request.
        if sent_at is None and marks.paused:
            return False
        return any(_is_for(marks.known.get(name), sent_at) for name in shared)

    def __enter__(self) -> "Stop":
        if self._cancels.marks.known and self.marked():
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
        self.marks = Marks(store, self._end_marked)
        self._running: dict[Limit, None] = {}
        self._begun = asyncio.Event()
        self._clock = asyncio.get_running_loop().time

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

    async def run(self) -> None:
        """Look for marks while something is held, until cancelled."""
        while True:
            await self._begun.wait()
            began = self._clock()
            pause = await self.marks.look()
            took = self._clock() - began
            await asyncio.sleep(max(pause - took, min(took, SLOW)))
            if not self._running:
                self._begun.clear()
                # What is known stays: an attempt that fails sooner than a listing ends would find none at the next.
                self.marks.paused = True

    def _end_marked(self) -> None:
        marked = [one for one in self._running if isinstance(one, Stop) and not one.expired and one.marked()]
        for one in marked:
            one.expire()
        if marked:
            log.info("requests_cancelled", requests=len(marked))

    def settled(self, message: Message, answer: Answer, job: Job | None) -> None:
        """Remove the marks of a message, if it has any: it was acked, and its request was answered so."""
        cancelled = answer.status_code == Cancelled.status_code
        if cancelled or self.marks.known:
            self._settled(message, job, cancelled=cancelled)
        for other in answer.also:
            self.settled(message, other.answer, other.job)

    def _settled(self, message: Message, job: Job | None, *, cancelled: bool) -> None:
        known = self.marks.known
        own, *shared = _names(message, job)
        # What was answered from a store, at once, has a mark that is perhaps not known before the next listing.
        if own in known or cancelled:
            self.marks.remove(own, 0.0 if own in known else LINGER)
        for name in shared:
            mark = known.get(name)
            if _is_for(mark, message.sent_at) or (cancelled and mark is None):
                self.marks.remove(name, LINGER)

    async def close(self) -> None:
        """Remove what is to be removed, for a little while. Nothing is held any more."""
        await self.marks.close()


def _names(message: Message, job: Job | None) -> tuple[str, ...]:
    """What marks of a request are called: of its message, and of its `inference_id` if it has one."""
    inference_id = None if job is None else job.options.inference_id
    own = mark_name(message.id)
    return (own,) if inference_id is None else (own, mark_name(inference_id))


def _is_for(mark: Listed | None, sent_at: float | None) -> bool:
    """Whether a mark, if there is one, is for a request that was sent then."""
    return mark is not None and (sent_at is None or sent_at <= mark.modified + SKEW)


def _cancelled() -> Cancelled:
    return Cancelled("the request was cancelled by its sender")
