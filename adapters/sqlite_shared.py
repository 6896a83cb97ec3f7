"""Which SQLite files this process has open: one thread for each, for as long as anybody uses it."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar, cast

from rejoinder.adapters.errors import AdapterError
from rejoinder.adapters.sqlite_operations import Operation
from rejoinder.adapters.sqlite_thread import FileThread, Goodbye, Hello, Request

R = TypeVar("R")

_threads: dict[Path, FileThread] = {}
_users: dict[FileThread, int] = {}
_lock = threading.Lock()


class OpenFile:
    """One opener's use of a file."""

    def __init__(self, thread: FileThread, file_id: str) -> None:
        self.thread = thread
        self.file_id = file_id
        """What the file calls itself: chosen at random when it was created."""
        self._closed = False

    async def call(self, operation: Operation[R]) -> R:
        """Queue `operation` and wait for its outcome. Raises as the operation failed, or because this is closed."""
        if self._closed:
            raise AdapterError(f"{self.thread.path} is closed")
        self.thread.submit(cast("Request", operation))
        return await operation.future

    async def close(self) -> None:
        """Finish what was called before and fail what still waits; the last one ends the thread and closes the file."""
        self._closed = True
        goodbye = Goodbye(self)
        self.thread.submit(goodbye)
        try:
            # Once this is resolved, receives that were cancelled meanwhile have queued the return of their messages,
            # before the stop below.
            await goodbye.future
        finally:
            if _leave(self.thread):
                await self.thread.stop()


@asynccontextmanager
async def shared_file(path: Path) -> AsyncIterator[OpenFile]:
    """Open the queue file at `path`, an absolute path without links, or share the one that is open in this process.

    Raises:
        NotFound, Denied, Transient, AdapterError: as `rejoinder.adapters.sqlite_file.open_database`.
    """
    file = OpenFile(_join(path), "")
    try:
        file.file_id = await file.call(Hello())
        yield file
    finally:
        await file.close()


def _join(path: Path) -> FileThread:
    with _lock:
        thread = _threads.get(path)
        if thread is None:
            thread = _threads[path] = FileThread(path)
        _users[thread] = _users.get(thread, 0) + 1
        return thread


def _leave(thread: FileThread) -> bool:
    """Return whether that was the last user, who has to stop the thread."""
    with _lock:
        _users[thread] -= 1
        if _users[thread]:
            return False
        del _users[thread], _threads[thread.path]
        return True
