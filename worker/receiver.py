"""Keeps as many receives in flight as the room and the broker ask for."""

import asyncio
from collections.abc import Callable, Sequence

import structlog

from rejoinder.adapters import Message, Subscription, Transient
from rejoinder.worker.pace import Pace
from rejoinder.worker.retry import Backoff, bounded

log = structlog.get_logger(__name__)

# The longest poll: it bounds only how often an idle worker asks, since a message or a stop ends it at once.
RECEIVE_WAIT = 20.0
# Receives in flight at most. Sixteen of ten messages keep 160 coming on SQS, more than one event loop gets through in a
# round trip.
MAX_RECEIVES = 16
# A cancelled receive may take this long to let go of what was leased for it.
CANCEL_SECONDS = 5.0


class Receiver:
    """Receives from one subscription, in several calls at once where one cannot bring all that there is room for.

    A second receive is started only when the first came back full, and a further one with each that does: an idle queue
    is asked by one. What all that are in flight ask for together is never more than the room was when the last of them
    was started. While the broker is away, one receive tries again after a pause that all share.

    Args:
        subscription: Where messages come from.
        room: How many messages may be held beyond those held now.
        take: Given the messages of each receive, and the loop's time before which it was not asked for.
        pace: Told how long a receive takes.
    """

    def __init__(
        self,
        subscription: Subscription,
        room: Callable[[], int],
        take: Callable[[Sequence[Message], float], None],
        pace: Pace,
    ) -> None:
        self._subscription = subscription
        self._room = room
        self._take = take
        self._pace = pace
        self._asked: dict[asyncio.Task[None], int] = {}
        self._width = 1
        self._backoff = Backoff("receive")
        self._paused = False
        self._wake = asyncio.Event()
        self._stopping = False
        self.late: list[Message] = []
        """Messages that came with the stop, and were not given to `take`."""
        self._failed: BaseException | None = None

    def wake(self) -> None:
        """There may be more room."""
        self._wake.set()

    def stop(self) -> None:
        """Let `run` end all receives and return."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Receive until `stop` is called.

        Raises:
            AdapterError: the broker refuses for good (permission, queue gone).
        """
        while not self._stopping and self._failed is None:
            if not self._paused:
                self._ask()
            self._wake.clear()
            await self._wake.wait()
        self._stopping = True
        await self._end()
        if self._failed is not None:
            raise self._failed

    def _ask(self) -> None:
        """Start the receives that there is room for."""
        most = self._subscription.max_receive
        while len(self._asked) < self._width:
            share = min(self._room() - sum(self._asked.values()), most)
            # Beside another one, only a whole share is worth a call: what gets free one by one gathers for the next.
            if share < 1 or (self._asked and share < most):
                return
            task = asyncio.create_task(self._receive(share))
            self._asked[task] = share
            task.add_done_callback(self._on_done)

    async def _receive(self, limit: int) -> None:
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            messages = await bounded(self._subscription.receive(limit, RECEIVE_WAIT), beyond=RECEIVE_WAIT)
        except Transient as exc:
            self._pause(exc)
            return
        self._backoff.succeeded()
        if self._stopping:  # they came with the signal: nothing starts any more
            self.late += messages
            return
        if len(messages) == limit:
            # Only a receive that was filled tells the round trip: any other may have waited for messages to come.
            self._pace.received(clock() - started)
            self._width = min(2 * self._width, MAX_RECEIVES)
        else:
            self._width = max(1, self._width - 1) if messages else 1
        if messages:
            self._take(messages, started)

    def _pause(self, exc: Transient) -> None:
        """Ask nothing for a while, and then with one receive. Others in flight that fail meanwhile change nothing."""
        self._width = 1
        if self._paused:
            return
        self._paused = True
        asyncio.get_running_loop().call_later(self._backoff.failed(exc), self._resume)

    def _resume(self) -> None:
        self._paused = False
        self._wake.set()

    def _on_done(self, task: asyncio.Task[None]) -> None:
        del self._asked[task]
        if not task.cancelled() and (exc := task.exception()) is not None:
            self._failed = self._failed or exc
        self._wake.set()

    async def _end(self) -> None:
        """End all receives at once."""
        tasks = list(self._asked)
        for task in tasks:
            task.cancel()
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
            if left:
                log.warning("receive_does_not_end", receives=len(left))
