"""Dynamic batches: what is waiting is called together, and one bad item fails alone."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Generic, TypeVar

from rejoinder.worker.engines.functions.batch_calls import Call, carried, concerns_all, miscounted, stopped

Item = TypeVar("Item")


@dataclass(frozen=True)
class BatchLimits:
    """What one batch may be, and how long it may take to gather."""

    size: int
    """Items, at least 1."""
    bytes: int
    """Of its items together; a single item may be larger, and runs alone."""
    wait: float
    """Seconds that the oldest item waits for others to come, while a call could be made."""


class Batches(Generic[Item]):
    """Turns single items, each with an answer, into calls with many of them. Made on the event loop that it runs on.

    A batch starts when fewer than `concurrency` calls are under way and it is full or its oldest item has waited as
    long as it may; else items gather. Within a key they run in the order of their coming; among keys whose batch could
    start, the one with the oldest item is next, so none starves.

    Args:
        call: Takes items of one key; returns a list or tuple with the answer of each, by position. An answer that is an
            exception is that item's. If it raises, or gives another number of answers, it is called again with each
            half of the items, until single ones fail alone. A `RetryableError` is every item's at once, unless memory
            was short. It is cancelled when nobody waits for any of its answers any more.
        limits: Of one batch.
        key: Items of different keys never share a call. None: all may.
        concurrency: Calls under way at once.
        linger: The last one that waits for a call returns, if it is cancelled, only when that call has ended.
    """

    def __init__(
        self,
        call: Callable[[Sequence[Item]], Awaitable[Sequence[Any]]],
        limits: BatchLimits,
        *,
        key: Callable[[Item], Hashable] | None = None,
        concurrency: int = 1,
        linger: bool = False,
    ) -> None:
        self._call = call
        self._limits = limits
        self._key = key
        self._concurrency = concurrency
        self._linger = linger
        self._loop = asyncio.get_running_loop()
        self._context = copy_context()  # calls have this one, not that of whoever happened to come first
        self._queues: dict[Hashable, _Queue[Item]] = {}
        # By the number of their oldest item. An entry whose queue has another oldest one now, or is full no more, is
        # passed over when it comes to the top: cheaper than to look for it.
        self._oldest: list[tuple[int, _Queue[Item]]] = []
        self._full: list[tuple[int, _Queue[Item]]] = []
        self._entered = 0
        self._waiting = 0
        self._running = 0
        self._runners: dict[asyncio.Task[None], list[_Entry[Item]]] = {}  # with what each has taken
        self._starting = False  # a runner has been made that has not looked yet what there is
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False

    @property
    def waiting(self) -> int:
        """Items in no batch yet."""
        return self._waiting

    @property
    def running(self) -> int:
        """Items of batches under way; a cancelled one counts until its batch is done."""
        return self._running

    async def submit(self, item: Item, size: int = 0) -> Any:
        """Return the item's answer.

        Args:
            item: Anything.
            size: Its bytes.

        Raises:
            Exception: its own, or that of its call. What `asyncio` cannot carry, such as `SystemExit`,
                `StopIteration` or a cancelling that is not the caller's, is the cause of a `Failed`.
            Unavailable: stopped.
        """
        if self._stopped:
            raise stopped()
        entry = self._enter(item, size)
        try:
            return await entry.future
        except asyncio.CancelledError:
            if self._withdraw(entry) and self._linger and entry.call is not None:
                await entry.call.wait()
            raise
        finally:
            del entry  # its future keeps an error, whose traceback keeps this frame

    async def stop(self) -> None:
        """Take nothing more. All that wait for an answer raise `Unavailable`; calls are cancelled. Idempotent.

        Returns when the calls have ended.
        """
        self._close()
        for runner in self._runners:
            runner.cancel()
        if self._runners:
            await asyncio.wait(list(self._runners))

    def _close(self) -> None:
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        left = [entry for queue in self._queues.values() for entry in queue.entries if entry.queue is not None]
        for entry in left:
            entry.queue = None
        self._queues.clear()
        self._oldest.clear()
        self._full.clear()
        self._waiting = 0
        for batch in (left, *self._runners.values()):
            for entry in batch:
                _answer(entry, stopped())

    def _enter(self, item: Item, size: int) -> "_Entry[Item]":
        queue = self._queue(item)
        self._entered += 1
        entry = _Entry(item, size, self._loop.create_future(), self._entered, self._loop.time())
        entry.queue = queue
        self._waiting += 1
        queue.bytes += size
        queue.count += 1
        queue.entries.append(entry)
        if queue.count == 1:
            heappush(self._oldest, (entry.number, queue))
        if not queue.full:
            self._look(queue)
        if (queue.full or self._timer is None) and not self._starting and len(self._runners) < self._concurrency:
            self._wake()
        return entry

    def _queue(self, item: Item) -> "_Queue[Item]":
        key, queue = None, None
        if self._key is None:
            queue = self._queues.get(None)
        else:
            error = None
            try:
                key = self._key(item)
                queue = self._queues.get(key)
            except BaseException as exc:  # noqa: BLE001 - the user's code: whatever it is, it is this item's alone
                error = carried(exc)
            if error is not None:
                raise error
        if queue is None:
            queue = self._queues[key] = _Queue(key)
        return queue

    def _withdraw(self, entry: "_Entry[Item]") -> bool:
        """Its caller was cancelled. Returns whether nobody waits for its call any more, which goes on."""
        queue, call = entry.queue, entry.call
        if queue is not None:
            entry.queue = None
            self._waiting -= 1
            queue.bytes -= entry.size
            queue.count -= 1
            if queue.entries[0] is entry:
                self._settle(queue)
            else:
                queue.full = self._is_full(queue)
        elif call is not None and not call.over:
            call.wanted -= 1
            if not call.wanted:
                call.runner.cancel()
                return True
        return False

    def _settle(self, queue: "_Queue[Item]") -> None:
        """Its oldest has left: who is it now?"""
        entries = queue.entries
        while entries and entries[0].queue is None:
            entries.popleft()
        if entries:
            heappush(self._oldest, (entries[0].number, queue))
            self._look(queue)
        else:
            queue.full = False
            self._queues.pop(queue.key, None)

    def _look(self, queue: "_Queue[Item]") -> None:
        queue.full = self._is_full(queue)
        if queue.full:
            heappush(self._full, (queue.entries[0].number, queue))

    def _is_full(self, queue: "_Queue[Item]") -> bool:
        return queue.count >= self._limits.size or queue.bytes >= self._limits.bytes

    def _wake(self) -> None:
        """Make a runner if there is something for it to run, else see to it that there is one in time."""
        if self._starting or self._stopped or not self._waiting or len(self._runners) >= self._concurrency:
            return
        if self._ripe() is not None:
            self._starting = True
            # A new task first runs after everything that is ready now has put in its own: even the first batch is full.
            self._runners[self._loop.create_task(self._run(), context=self._context.copy())] = []
        elif self._timer is None:
            # One for all: nobody who comes later must be called earlier.
            self._timer = self._loop.call_at(self._oldest[0][1].entries[0].came + self._limits.wait, self._due)

    def _due(self) -> None:
        self._timer = None
        self._wake()

    def _ripe(self) -> "_Queue[Item] | None":
        """Whose batch is next, if any can start."""
        oldest, full = self._oldest, self._full
        while full and not (full[0][1].full and full[0][1].entries[0].number == full[0][0]):
            heappop(full)
        while oldest and not (oldest[0][1].entries and oldest[0][1].entries[0].number == oldest[0][0]):
            heappop(oldest)
        if oldest and oldest[0][1].entries[0].came + self._limits.wait <= self._loop.time():
            return oldest[0][1]
        return full[0][1] if full else None

    def _take(self) -> "list[_Entry[Item]]":
        """The next batch; empty if none can start."""
        batch: list[_Entry[Item]] = []
        size, bytes_ = self._limits.size, self._limits.bytes
        while not batch and (queue := self._ripe()) is not None:
            entries, total = queue.entries, 0
            while entries and len(batch) < size:
                entry = entries[0]
                if entry.queue is not None:  # else cancelled while others were ahead of it
                    if batch and total + entry.size > bytes_:
                        break
                    entry.queue = None
                    self._waiting -= 1
                    queue.bytes -= entry.size
                    queue.count -= 1
                    if not entry.future.done():  # else cancelled a moment ago
                        total += entry.size
                        batch.append(entry)
                entries.popleft()
            self._settle(queue)
        return batch

    async def _run(self) -> None:
        """One batch. The next has its own task: what a function does to its task or context does not outlast it."""
        runner = asyncio.current_task()
        assert runner is not None  # noqa: S101
        self._starting = False
        batch = self._runners[runner] = self._take()
        self._running += len(batch)
        try:
            self._wake()  # for whatever else could start
            await self._serve(batch, runner)
        finally:
            self._running -= len(batch)
            del self._runners[runner]
            if runner.cancelling():
                self._loop.call_soon(self._wake)  # the loop may be ending: let all others hear of it first
            else:
                self._wake()

    async def _serve(self, batch: "list[_Entry[Item]]", runner: "asyncio.Task[None]") -> None:
        groups = [batch]
        while groups:
            group = [entry for entry in groups.pop() if not entry.future.done()]
            if not group:
                continue
            call = Call(runner, len(group))
            for entry in group:
                entry.call = call
            answers, error = await self._called([entry.item for entry in group])
            call.end()
            if isinstance(error, asyncio.CancelledError) and self._stopped:
                raise error
            if error is None:
                for entry, answer in zip(group, answers, strict=True):
                    _answer(entry, answer)
            elif len(group) == 1 or concerns_all(error):
                for entry in group:
                    _answer(entry, error)
            else:
                middle = len(group) // 2
                groups += [group[middle:], group[:middle]]

    async def _called(self, items: list[Item]) -> tuple[Sequence[Any], BaseException | None]:
        # An error's traceback has this frame and keeps what is named here: no entries, whose futures keep the error.
        try:
            answers = await self._call(items)
        except BaseException as exc:
            if not self._loop.is_running():
                raise
            return (), exc
        return answers, miscounted(answers, len(items))


class _Queue(Generic[Item]):
    """The waiting items of one key. Those cancelled stay among the entries, but are not counted."""

    __slots__ = ("bytes", "count", "entries", "full", "key")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.entries: deque[_Entry[Item]] = deque()  # the first one is never a cancelled one
        self.count = 0
        self.bytes = 0
        self.full = False


class _Entry(Generic[Item]):
    __slots__ = ("call", "came", "future", "item", "number", "queue", "size")

    def __init__(self, item: Item, size: int, future: asyncio.Future[Any], number: int, came: float) -> None:
        self.item = item
        self.size = size
        self.future = future
        self.number = number
        self.came = came
        self.queue: _Queue[Item] | None = None  # None: in a batch, or cancelled
        self.call: Call | None = None


def _answer(entry: _Entry[Any], answer: Any) -> None:
    if entry.future.done():
        return
    if isinstance(answer, BaseException):
        entry.future.set_exception(carried(answer))
    else:
        entry.future.set_result(answer)
