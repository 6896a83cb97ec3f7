"""How much of the inputs that are read by location is in memory at once."""

import asyncio
from collections import deque


class Room:
    """Bytes that are shared out, first come, first served.

    Args:
        limit: Bytes in all. Somebody who wants more than that by himself gets it when nobody else has any.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    def share(self) -> "Share":
        """A share without anything in it yet."""
        return Share(self)

    def try_take(self, size: int) -> bool:
        """Take `size` bytes if there are as many now and nobody waits for any."""
        if self._waiting or not self._fits(size):
            return False
        self.used += size
        return True

    async def take(self, size: int) -> None:
        """Wait for `size` bytes and take them."""
        if self.try_take(size):
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (future, size)
        self._waiting.append(entry)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give(size)  # they were handed over just before
            else:
                if entry in self._waiting:  # else `give` has passed over it
                    self._waiting.remove(entry)
                self.give(0)  # those behind may want less
            raise

    def give(self, size: int) -> None:
        """Give `size` bytes back."""
        self.used -= size
        while self._waiting and self._fits(self._waiting[0][1]):
            future, wanted = self._waiting.popleft()
            if not future.done():  # cancelled, and its task has not had a turn since
                self.used += wanted
                future.set_result(None)

    def _fits(self, size: int) -> bool:
        return not self.used or self.used + size <= self._limit


class Share:
    """What one message has of a room."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._size = 0

    def try_hold(self, size: int) -> bool:
        """Whether it has `size` bytes now, taken from the room if they were there."""
        if size > self._size:
            # All anew, or two that have some could each wait for what the other has.
            self.free()
            if not self._room.try_take(size):
                return False
            self._size = size
        return True

    async def hold(self, size: int) -> None:
        """Wait until it has `size` bytes."""
        if not self.try_hold(size):
            await self._room.take(size)
            self._size = size

    def free(self) -> None:
        """Give everything back."""
        size, self._size = self._size, 0
        if size:
            self._room.give(size)
