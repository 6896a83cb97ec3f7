"""What an engine is to the worker. The worker never looks inside; an engine never sees a broker or an envelope."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request as an engine sees it: validated as JSON, its body not yet interpreted."""

    path: str
    """One of the engine's `paths`."""
    body: Any
    """The request's body, any JSON value."""
    response_id: str
    """The same on every redelivery: names the answer, and seeds what is random in it."""
    created: int
    """When the broker took the request, seconds since the epoch: the same on every redelivery."""
    attempt: int | None = None
    """Which delivery this is, from 1; None where the broker does not count."""
    waits: Callable[[bool], None] | None = None
    """Called with True when it must wait for others' sake, and with False when its turn comes: its own time does not
    run meanwhile."""


class Engine(Protocol):
    """Runs requests. All methods are called on the worker's one event loop and never block it.

    An engine is started once, serves any number of concurrent `generate` calls, and is stopped once.
    """

    @property
    def paths(self) -> frozenset[str]:
        """The paths that this engine serves. The worker answers 404 to any other."""

    @property
    def capacity(self) -> int:
        """How many requests it can run at once now: the worker holds no more than this plus a prefetch.

        0 while it cannot run any (starting, restarting). May change at any time.
        """

    @property
    def progress(self) -> int:
        """Grows with every step of work. Unchanged for long while requests run: the engine hangs."""

    async def start(self) -> None:
        """Load what is needed; return when requests can be served.

        Raises:
            EngineGone: it cannot be started; the message says what to fix.
        """

    async def generate(self, request: EngineRequest) -> Any:
        """Run one request to its end and return the response's body, any JSON value.

        The same request gives the same body, whatever else is in the batch. Cancelling the call stops the work.

        Raises:
            RequestError: the request is answered with this error (`BadRequest`, `Missing`, `RequestTooLarge`).
            RetryableError: the request comes back later (`Failed`, `Unavailable`).
            EngineGone: the engine will not come back.
        """

    async def wait_gone(self) -> None:
        """Return only when the engine has died too often to come back; for an engine that cannot, never."""

    async def stop(self) -> None:
        """Free everything. Calls still running raise `Unavailable`. Idempotent."""
