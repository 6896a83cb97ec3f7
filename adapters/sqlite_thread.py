"""One thread for each SQLite file of the process, shared by everything that has the file open here.

The thread takes every operation that is queued to it, runs them in one transaction, commits with one fsync, and then
tells each event loop once. Under load, the operations that arrive during one fsync are the group of the next.

Waiting receives are kept here. They look again when this process commits (within the same transaction), when another
process has committed (noticed by polling `PRAGMA data_version`, which reads shared memory), and when the next lease
or delay of their queue ends.
"""

import asyncio
import queue
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rejoinder.adapters.driver import Message
from rejoinder.adapters.errors import AdapterError
from rejoinder.adapters.sqlite_file import Database, open_database, patiently, translate
from rejoinder.adapters.sqlite_operations import (
    AnyOperation,
    CountBacklog,
    Lease,
    LetGo,
    Operation,
    Publish,
    Receive,
    Settle,
)
from rejoinder.adapters.sqlite_statements import available, count_backlog, execute, next_due, untidy

POLL_FAST = 0.002
"""Seconds between looks for other processes' commits just after something happened."""
POLL_SLOW = 0.04
"""Seconds between looks when nothing happens: 25 a second, of some microseconds each."""


class Hello(Operation[str]):
    """Ask for the file's id; fails as opening the file failed."""


class Goodbye(Operation[None]):
    """Wait for everything that was queued before; receives of `owner` that still wait fail."""

    def __init__(self, owner: object) -> None:
        super().__init__()
        self.owner = owner


class Stop(Operation[None]):
    """Close the file and end the thread."""


Request = AnyOperation | Hello | Goodbye | Stop


class FileThread:
    """The one user of one file in this process. `submit` and `let_go` may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.polls = 0
        """Looks for other processes' commits so far."""
        self._inbox: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._waiting: list[Receive] = []
        self._done: list[Operation[Any]] = []
        self._version = -1
        self._due = float("inf")
        self._poll = POLL_FAST
        # A daemon: a process that ends without closing ends as if it were killed, which loses nothing.
        self._thread = threading.Thread(target=self._run, name=f"sqlite {path.name}", daemon=True)
        self._thread.start()

    def submit(self, operation: Request) -> None:
        """Queue an operation; its future is resolved on its loop after the commit."""
        self._inbox.put(operation)

    def let_go(self, messages: Sequence[Message]) -> None:
        """Make messages that were leased for nobody available again."""
        self._inbox.put(LetGo([cast("Lease", message.lease) for message in messages]))

    async def stop(self) -> None:
        """Finish what is queued, close the file and end the thread."""
        stop = Stop()
        self._inbox.put(stop)
        await stop.future
        self._thread.join()  # resolving the future was its last act

    def _run(self) -> None:
        try:
            database = open_database(self.path)
            try:
                stop = self._serve(database)
            finally:
                database.connection.close()
        except Exception as exc:  # noqa: BLE001 - whatever it is, callers wait for an answer
            stop = self._refuse(exc)
        self._done.append(stop)
        self._tell()

    def _refuse(self, reason: Exception) -> Stop:
        """Answer everything with why the file could not be opened."""
        while True:
            operation = self._inbox.get()
            if isinstance(operation, Stop):
                return operation
            if not isinstance(operation, Goodbye):
                self._fail([operation], reason)
            if isinstance(operation, Operation):
                self._done.append(operation)
            self._tell()

    def _serve(self, database: Database) -> Stop:
        while True:
            stop: Stop | None = None
            goodbyes: list[Goodbye] = []
            group: list[AnyOperation] = []
            arrived = self._take(self._pause())
            for operation in arrived:
                match operation:
                    case Hello():
                        operation.outcome = database.file_id
                        self._done.append(operation)
                    case Goodbye():
                        goodbyes.append(operation)
                    case Stop():
                        stop = operation
                    case Receive():
                        self._waiting.append(operation)
                    case Publish() | Settle() | LetGo() | CountBacklog():
                        group.append(operation)
            self._work(database, group, anything_new=bool(arrived))
            for goodbye in goodbyes:
                self._dismiss(goodbye)
            self._tell()
            if stop is not None:
                return stop

    def _take(self, timeout: float | None) -> list[Request]:
        try:
            arrived = [self._inbox.get(timeout=timeout)]
        except queue.Empty:
            return []
        while not self._inbox.empty():  # this thread is the only taker
            arrived.append(self._inbox.get_nowait())
        return arrived

    def _pause(self) -> float | None:
        """Return the seconds until there is something to look for; None while nobody waits."""
        if not self._waiting:
            return None
        deadline = min(receive.deadline for receive in self._waiting) - time.monotonic()
        return max(0.0, min(deadline, self._due - time.time(), self._poll))

    def _work(self, database: Database, group: list[AnyOperation], *, anything_new: bool) -> None:
        """Run `group`, serve the waiting receives that can be served, and end those whose time is up."""
        self._waiting = [receive for receive in self._waiting if not receive.future.cancelled()]
        if not group and not self._waiting:
            return
        try:
            database.check_in_place()
            changed = self._has_changed(database)  # before looking: a later commit is a later change
            now = time.time()
            if anything_new or changed or now >= self._due:
                self._poll = POLL_FAST
                self._look(database, group, now)
            else:
                self._poll = min(self._poll * 2, POLL_SLOW)
        except Exception as exc:  # noqa: BLE001 - whatever it is, callers wait for an answer
            self._fail([operation for operation in (*group, *self._waiting) if not operation.answered], exc)
        self._done.extend(operation for operation in group if isinstance(operation, Operation))
        self._end_receives()

    def _has_changed(self, database: Database) -> bool:
        if not self._waiting:
            return False
        self.polls += 1
        before, self._version = self._version, database.data_version()
        return self._version != before

    def _look(self, database: Database, group: list[AnyOperation], now: float) -> None:
        writes: list[AnyOperation] = []
        for operation in group:
            if isinstance(operation, CountBacklog) and not untidy(database, operation.queue, operation.options, now):
                count_backlog(database, operation, now)
            else:
                writes.append(operation)
        # Beside a write, all receives look within its transaction: it may be for them. By themselves, they take the
        # lock only when there is something to receive.
        available_in = {receive.queue: bool(writes) for receive in self._waiting}
        if not writes:
            available_in = {queue: available(database, queue, now) for queue in available_in}
        writes.extend(receive for receive in self._waiting if available_in[receive.queue])
        if writes:
            self._commit(database, writes)
        dues = (next_due(database, queue) for queue in available_in)
        self._due = min((due for due in dues if due is not None), default=float("inf"))

    def _commit(self, database: Database, group: Sequence[AnyOperation]) -> None:
        """Run `group` in one transaction; where one of it fails, each in its own."""
        connection = database.connection
        try:
            patiently(lambda: connection.execute("BEGIN IMMEDIATE"))
            try:
                execute(database, group, time.time())
            except Exception:
                _roll_back(connection)
                if len(group) == 1:
                    raise
                for operation in group:
                    self._commit(database, [operation])
                return
            connection.execute("COMMIT")
        except Exception as exc:  # noqa: BLE001 - whatever it is, callers wait for an answer
            _roll_back(connection)
            self._fail(group, exc)

    def _end_receives(self) -> None:
        now = time.monotonic()
        still_waiting: list[Receive] = []
        for receive in self._waiting:
            if not receive.answered:
                if receive.deadline > now:
                    still_waiting.append(receive)
                    continue
                receive.outcome = []
            self._done.append(receive)
        self._waiting = still_waiting

    def _dismiss(self, goodbye: Goodbye) -> None:
        theirs = [receive for receive in self._waiting if receive.owner is goodbye.owner]
        self._fail(theirs, AdapterError(f"{self.path} was closed during this receive"))
        self._end_receives()
        self._done.append(goodbye)

    def _fail(self, group: Sequence[Request], reason: Exception) -> None:
        for operation in group:
            error = translate(reason, self.path)
            error.__cause__ = reason
            operation.fail(error)

    def _tell(self) -> None:
        """Resolve what is done, with one wake-up for each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Operation[Any]]] = {}
        for operation in self._done:
            by_loop.setdefault(operation.loop, []).append(operation)
        self._done = []
        for loop, operations in by_loop.items():
            try:
                loop.call_soon_threadsafe(_resolve, operations)
            except RuntimeError:  # the loop was closed over its waiting tasks: nobody will learn of this
                for operation in operations:
                    operation.abandon()


def _resolve(operations: Sequence[Operation[Any]]) -> None:
    for operation in operations:
        operation.resolve()


def _roll_back(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:
        connection.execute("ROLLBACK")
