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
        self._pending: deque[tuple[Item, asyncio.Future[Outcome]]] = deque()
        self._running: set[asyncio.Task[None]] = set()

    async def submit(self, item: Item) -> Outcome:
        """Put `item` into the next batch and return its outcome. Cancelling the caller does not recall the item."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._pending.append((item, future))
        if len(self._running) < self._concurrency:
            # A new task first runs after everything that is ready now has submitted, so even the first batch is full.
            task = asyncio.create_task(self._drain())
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return await future

    async def _drain(self) -> None:
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

    async def close(self) -> None:
        """Wait until everything submitted has its outcome."""
        while self._running:
            await asyncio.wait(self._running)
