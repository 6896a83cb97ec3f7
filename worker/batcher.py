"""Natural batching: while one call is under way the next ones gather, so batches grow with load and never wait."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class Batcher(Generic[Item, Outcome]):
    """Turns single submissions into batched calls.

    Args:
        flush: Takes a batch, returns one outcome for each item in order. If it raises, each item's submission raises.
        max_items: Items in one batch at most.
        concurrency: Batches under way at once.
    """

    def __init__(
        self,
        flush: Callable[[Sequence[Item]], Awaitable[Sequence[Outcome]]],
        *,
        max_items: int = 500,
        concurrency: int = 2,
    ) -> None:
        self._flush = flush
        self._max_items = max_items
        self._concurrency = concurrency
        self._loop = asyncio.get_running_loop()
        self._pending: deque[tuple[Item, asyncio.Future[Outcome]]] = deque()
        # A number, not the tasks: a task is done one turn after its last step, and what is submitted in that turn would
        # find it counted and wait for somebody else to submit.
        self._draining = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, item: Item) -> Outcome:
        """Put `item` into the next batch and return its outcome. Cancelling the caller does not recall the item."""
        future: asyncio.Future[Outcome] = self._loop.create_future()
        self._pending.append((item, future))
        if self._draining < self._concurrency:
            self._draining += 1
            # A new task first runs after everything that is ready now has submitted, so even the first batch is full.
            task = asyncio.create_task(self._drain())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await future

    async def _drain(self) -> None:
        try:
            await self._flush_all()
        finally:
            self._draining -= 1  # in the same step that found nothing pending

    async def _flush_all(self) -> None:
        while self._pending:
            batch = [self._pending.popleft() for _ in range(min(len(self._pending), self._max_items))]
            try:
                outcomes = await self._flush([item for item, _ in batch])
            except BaseException as exc:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(exc if isinstance(exc, Exception) else asyncio.CancelledError())
                if not isinstance(exc, Exception):
                    raise
                continue
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                if not future.done():
                    future.set_result(outcome)

    async def abort(self) -> None:
        """Flush nothing more: what is under way is cancelled, and every submission without an outcome with it."""
        while self._pending:
            self._pending.popleft()[1].cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
