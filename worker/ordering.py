"""Messages of one ordering key: run one after the other, in the order in which they were received."""

import asyncio
import math
from collections import deque
from itertools import islice

from rejoinder.adapters import Message
from rejoinder.worker.held import Held


class Turns:
    """Whose turn it is. One queue for each ordering key of which anything is held.

    A message has its turn when all of its key that were received before it are settled for good. When one is let go
    instead, those behind it are to be let go with it: whoever receives them next gets them in their order again.

    Args:
        keeps_order: Whether the broker does; if not, every message has its turn at once.
    """

    def __init__(self, keeps_order: bool) -> None:
        self._keeps_order = keeps_order
        self._queues: dict[str, deque[Held]] = {}
        self._held = 0
        self._closed: dict[str, tuple[float, str]] = {}

    @property
    def blocked(self) -> int:
        """How many wait for their turn."""
        return self._held - len(self._queues)

    def enter(self, held: Held) -> None:
        """Queue a message that was just received. Called in the order of receipt."""
        key = held.message.ordering_key
        if key is None or not self._keeps_order:
            return
        queue = self._queues.setdefault(key, deque())
        if queue:
            held.turn = asyncio.get_running_loop().create_future()
        queue.append(held)
        self._held += 1

    def ahead(self, held: Held) -> Held | None:
        """The one of its key that has its turn, if that is another."""
        queue = self._queue(held)
        return queue[0] if queue and queue[0] is not held else None

    def passed(self, held: Held) -> None:
        """It is settled for good: the next one's turn has come."""
        queue = self._queue(held)
        if queue and queue[0] is held:
            queue.popleft()
            self._left(held, queue)

    def free(self, held: Held) -> list[Held]:
        """It is to be let go: take out all behind it, which must go too. Returns these, in order.

        It keeps its place itself, so that what is received meanwhile waits behind it, until `cut`.
        """
        queue = self._queue(held)
        if queue is None or held not in queue:
            return []
        behind: list[Held] = []
        while queue[-1] is not held:
            behind.append(queue.pop())
        self._held -= len(behind)
        return behind[::-1]

    def cut(self, held: Held) -> list[Held]:
        """It is gone without being settled: take it out, and all behind it. Returns these, in order."""
        behind = self.free(held)
        queue = self._queue(held)
        if queue and queue[-1] is held:
            queue.pop()
            self._left(held, queue)
        return behind

    def busy(self, message: Message) -> bool:
        """Whether others of its key are held, behind which it would wait."""
        return message.ordering_key in self._queues

    def close(self, held: Held, seconds: float) -> None:
        """It was let go for `seconds`: until it comes again, or until then, nothing of its key is to be begun.

        A broker need not hold a key back for a message that is delayed: to Pub/Sub it is one that is being worked on.
        """
        key = held.message.ordering_key
        if key is None or not self._keeps_order or seconds <= 0:
            return
        now = asyncio.get_running_loop().time()
        for other in [other for other, (until, _) in islice(self._closed.items(), 2) if until <= now]:
            del self._closed[other]  # two for each that is added: what nobody asks for is forgotten
        self._closed.pop(key, None)
        self._closed[key] = now + math.ceil(seconds), held.message.id  # brokers round up

    def closed_until(self, message: Message) -> float | None:
        """The loop's time before which a message that was just received is not to be begun; None: it may be now."""
        closed = self._closed.get(message.ordering_key) if message.ordering_key is not None else None
        if closed is None:
            return None
        until, awaited = closed
        if message.id != awaited and until > asyncio.get_running_loop().time():
            return until
        del self._closed[str(message.ordering_key)]
        return None

    def _queue(self, held: Held) -> deque[Held] | None:
        return None if held.message.ordering_key is None else self._queues.get(held.message.ordering_key)

    def _left(self, held: Held, queue: deque[Held]) -> None:
        """One was taken out of a queue: its first one has its turn."""
        self._held -= 1
        if not queue:
            del self._queues[str(held.message.ordering_key)]
        elif (turn := queue[0].turn) is not None and not turn.done():
            turn.set_result(None)
