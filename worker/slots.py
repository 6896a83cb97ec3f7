"""The engine's free capacity, as the consumer shares it out."""

import asyncio
from collections import deque

from rejoinder.worker.engines.protocol import Engine


class Slots:
    """A semaphore whose size is the engine's capacity, which may change at any time. First come, first served.

    The engine does not tell when its capacity grows, so whoever owns this calls `wake` now and then.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.used = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def capacity(self) -> int:
        """The engine's capacity now."""
        return self._engine.capacity

    def try_acquire(self) -> bool:
        """Take a slot if one is free now and nobody waits for it."""
        if self.used < self.capacity and not self._waiting:
            self.used += 1
            return True
        return False

    async def acquire(self) -> None:
        """Wait for a slot and take it."""
        if self.try_acquire():
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self.wake()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release()  # the slot was handed over just before
            elif future in self._waiting:
                self._waiting.remove(future)
            raise

    def release(self) -> None:
        """Give a slot back."""
        self.used -= 1
        self.wake()

    def wake(self) -> None:
        """Hand free slots to those who wait."""
        while self._waiting and self.used < self.capacity:
            future = self._waiting.popleft()
            if not future.done():
                self.used += 1
                future.set_result(None)
