"""Results in the order of their lines, however they complete, and no more of them at once than memory bears."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass

PIECE = 256 * 1024
"""Bytes of results that are handed on together, at least."""


@dataclass(slots=True, eq=False)
class Entry:
    """One line's place."""

    size: int
    """Bytes that it has of the window: for the line at first, then of its result."""
    result: bytes | None = None


class Window:
    """What is between the reading of lines and the writing of their results.

    Args:
        count: Lines in it at most.
        size: Bytes in it at most, unless one line alone is larger. Results count when they are there, whatever came in
            meanwhile.
    """

    def __init__(self, count: int, size: int) -> None:
        self._count = count
        self._size = size
        self._entries: deque[Entry] = deque()
        self._bytes = 0
        self._left = asyncio.Event()
        self._news = asyncio.Event()
        self._ended = False
        self._failure: BaseException | None = None

    async def enter(self, size: int) -> Entry:
        """Wait for room and take a place behind all others, for a line that takes `size` bytes of memory."""
        while self._entries and (len(self._entries) >= self._count or self._bytes + size > self._size):
            self._left.clear()
            await self._left.wait()
        entry = Entry(size)
        self._entries.append(entry)
        self._bytes += size
        return entry

    def finish(self, entry: Entry, result: bytes) -> None:
        """Give a line its result."""
        self._bytes += len(result) - entry.size
        entry.size, entry.result = len(result), result
        if entry is self._entries[0]:
            self._news.set()

    def end(self, failure: BaseException | None = None) -> None:
        """No line comes any more; or, after a failure, no result either."""
        self._ended = True
        self._failure = self._failure or failure
        self._news.set()

    async def pieces(self) -> AsyncGenerator[bytes]:
        """The results, joined.

        Raises:
            BaseException: the failure that `end` was told.
        """
        piece = bytearray()
        while self._failure is None and not (self._ended and not self._entries):
            while self._entries and (result := self._entries[0].result) is not None:
                self._entries.popleft()
                self._bytes -= len(result)
                self._left.set()
                piece += result
                if len(piece) >= PIECE:
                    yield bytes(piece)
                    piece.clear()
            # A failure that came while a piece was written is the last news that there is.
            if self._failure is None and (self._entries or not self._ended):
                self._news.clear()
                await self._news.wait()
        if self._failure is not None:
            raise self._failure
        if piece:
            yield bytes(piece)
