"""Natural batching: while one call is under way the next items gather, so batches grow with load and never wait."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class Gatherer(Generic[Item]):
    """Turns single items into batches.

    Args:
        flush: Sees a batch through to its end. Raises nothing: nobody would hear of it.
        max_items: Items in one batch at most.
        concurrency: Batches under way at once.
        full: The same of full ones, which have nothing to gain by waiting. Default: no more than of others.
    """

    def __init__(
        self,
        flush: Callable[[list[Item]], Awaitable[None]],
        *,
        max_items: int = 500,
        concurrency: int = 2,
        full: int | None = None,
    ) -> None:
        self._flush = flush
        self._max_items = max_items
        self._concurrency = concurrency
        self._full = concurrency if full is None else full
        self._pending: deque[Item] = deque()
        # A number, not the tasks: a task is done one turn after its last step, and what is put in in that turn would
        # find it counted and wait for somebody else to come.
        self._draining = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, item: Item) -> None:
        """Let `item` be in the next batch."""
        self._pending.append(item)
        if self._draining < (self._full if len(self._pending) % self._max_items == 0 else self._concurrency):
            self._draining += 1
            # A new task first runs after everything that is ready now has put in its own: even the first batch is full.
            task = asyncio.create_task(self._drain())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _drain(self) -> None:
        pending = self._pending
        try:
            while pending and (len(pending) >= self._max_items or self._draining <= self._concurrency):
                if len(pending) <= self._max_items:
                    batch = list(pending)
                    pending.clear()
                else:
                    batch = [pending.popleft() for _ in range(self._max_items)]
                await self._flush(batch)
        finally:
            self._draining -= 1  # in the same step that found nothing pending, or too little

    async def abort(self) -> list[Item]:
        """Flush nothing more, whatever is put in from now on, and cancel what is under way.

        Returns the items that are in no batch.
        """
        self._concurrency = self._full = 0
        left = list(self._pending)
        self._pending.clear()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        return left


class Batcher(Generic[Item, Outcome]):
    """Turns single submissions, each with an outcome, into batched calls.

    Args:
        flush: Takes a batch, returns one outcome for each item in order. If it raises, each item's submission raises.
        max_items: Items in one batch at most.
        concurrency: Batches under way at once.
        full: The same of full ones, as `Gatherer`.
    """

    def __init__(
        self,
        flush: Callable[[Sequence[Item]], Awaitable[Sequence[Outcome]]],
        *,
        max_items: int = 500,
        concurrency: int = 2,
        full: int | None = None,
    ) -> None:
        self._flush = flush
        self._loop = asyncio.get_running_loop()
        self._gatherer: Gatherer[tuple[Item, asyncio.Future[Outcome]]] = Gatherer(
            self._flush_all, max_items=max_items, concurrency=concurrency, full=full
        )

    async def submit(self, item: Item) -> Outcome:
        """Put `item` into the next batch and return its outcome. Cancelling the caller does not recall the item."""
        future: asyncio.Future[Outcome] = self._loop.create_future()
        self._gatherer.put((item, future))
        return await future

    async def _flush_all(self, batch: list[tuple[Item, asyncio.Future[Outcome]]]) -> None:
        try:
            outcomes = await self._flush([item for item, _ in batch])
        except BaseException as exc:
            for _, future in batch:
                if not future.done():
                    future.set_exception(exc if isinstance(exc, Exception) else asyncio.CancelledError())
            if not isinstance(exc, Exception):
                raise
            return
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            if not future.done():
                future.set_result(outcome)

    async def abort(self) -> None:
        """Flush nothing more: what is under way is cancelled, and every submission without an outcome with it.

        Who submits later waits until cancelled.
        """
        for _, future in await self._gatherer.abort():
            future.cancel()
