"""What callers ask of the SQLite file.

An operation is made on its caller's event loop, runs on the file's thread (`rejoinder.adapters.sqlite_thread`) by
`rejoinder.adapters.sqlite_statements`, and is resolved on the loop again, after the commit.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from rejoinder.adapters.driver import Backlog, Message
from rejoinder.adapters.embedded import Options
from rejoinder.adapters.errors import AdapterError

R = TypeVar("R")


class Lease(NamedTuple):
    """The handle of one delivery. `attempt` fences it: the next delivery has another."""

    queue: str
    attempt: int
    seq: int


class Operation(Generic[R]):
    """One call that waits for its outcome."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[R] = self.loop.create_future()
        self.outcome: R | None = None
        self.error: AdapterError | None = None

    @property
    def answered(self) -> bool:
        """Whether there is an outcome or an error."""
        return self.outcome is not None or self.error is not None

    def fail(self, error: AdapterError) -> None:
        """Make `error` the outcome."""
        self.outcome = None
        self.error = error

    def resolve(self) -> None:
        """Hand the outcome to the caller. Called on the caller's loop."""
        if self.future.cancelled():
            self.abandon()
        elif self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.outcome)  # type: ignore[arg-type]  # None is R where it is the outcome

    def abandon(self) -> None:
        """Undo what nobody will learn of. Called on the caller's loop, or on the file's thread once that has closed."""


class Publish(Operation[list[str]]):
    """Append messages to a queue; the outcome is their ids."""

    def __init__(self, queue: str, rows: Sequence[tuple[str, bytes]]) -> None:
        super().__init__()
        self.queue = queue
        self.rows = rows  # attributes as JSON, body


class Settle(Operation[list[AdapterError | None]]):
    """Ack deliveries, or let their leases end `seconds` from the commit."""

    def __init__(self, leases: Sequence[Lease], seconds: float | None, options: Options) -> None:
        super().__init__()
        self.leases = leases
        self.seconds = seconds  # None: ack
        self.options = options


class Receive(Operation[list[Message]]):
    """Lease messages, as soon as there are any."""

    def __init__(
        self,
        queue: str,
        options: Options,
        limit: int,
        wait: float,
        *,
        owner: object,
        let_go: Callable[[list[Message]], None],
    ) -> None:
        super().__init__()
        self.owner = owner
        self.queue = queue
        self.options = options
        self.limit = limit
        self.deadline = time.monotonic() + wait
        self.let_go = let_go

    def abandon(self) -> None:
        """Let go what was leased for a caller that went away meanwhile."""
        if self.outcome:
            self.let_go(self.outcome)


class LetGo:
    """Make deliveries that nobody has seen available again, as if they had not happened.

    Nobody waits for the outcome: where this fails, the leases run out.
    """

    answered = True

    def __init__(self, leases: Sequence[Lease]) -> None:
        self.leases = leases

    def fail(self, error: AdapterError) -> None:
        """Tell nobody."""


class CountBacklog(Operation[Backlog]):
    """Count a queue."""

    def __init__(self, queue: str, options: Options) -> None:
        super().__init__()
        self.queue = queue
        self.options = options


AnyOperation = Publish | Settle | Receive | LetGo | CountBacklog
