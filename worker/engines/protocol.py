"""What an engine is to the worker. The worker never looks inside; an engine never sees a broker or an envelope."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(slots=True)  # not frozen: making one would take three times as long
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
    emit: Callable[[Any], None] | None = None
    """Where it is there, a stream is asked for: called on the event loop with each chunk, any JSON value, as it comes.
    What `generate` returns then is the body of the stream's last message."""
    headers: Mapping[str, str] | None = None
    """What its options say as HTTP would: `Content-Type`, `Accept`, `X-Amzn-SageMaker-Custom-Attributes`."""
    size: int = 0
    """Bytes of its body as JSON, about; 0 where nobody knows."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine has done since it was started. Everything only grows: a difference is what an interval brought."""

    steps: int = 0
    """Of the model. Those made again after a failure count again, with what is in them."""
    sequences: int = 0
    """In a step, summed over the steps."""
    places: int = 0
    """Sequences that there is room for in a step, summed likewise."""
    tokens: int = 0
    """That the model took in: those of prompts, unless shared with earlier ones, and those generated but the last."""
    idle_seconds: float = 0.0
    """Without any sequence, while the engine was there."""

    def __add__(self, other: "EngineStats") -> "EngineStats":
        return EngineStats(
            self.steps + other.steps,
            self.sequences + other.sequences,
            self.places + other.places,
            self.tokens + other.tokens,
            self.idle_seconds + other.idle_seconds,
        )

    def __sub__(self, other: "EngineStats") -> "EngineStats":
        return EngineStats(
            self.steps - other.steps,
            self.sequences - other.sequences,
            self.places - other.places,
            self.tokens - other.tokens,
            self.idle_seconds - other.idle_seconds,
        )

    @property
    def occupancy(self) -> float:
        """The share of the places that was taken, on average over the steps; 0 where there was none."""
        return self.sequences / self.places if self.places else 0.0


@dataclass(frozen=True, slots=True)
class WithHeaders:
    """A result of `Engine.generate` that has more than a body."""

    body: Any
    headers: Mapping[str, str]


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

    @property
    def stats(self) -> EngineStats:
        """What it has done. Zeros for an engine that has no steps."""

    async def start(self) -> None:
        """Load what is needed; return when requests can be served.

        Raises:
            EngineGone: it cannot be started; the message says what to fix.
        """

    async def generate(self, request: EngineRequest) -> Any:
        """Run one request to its end and return the response's body, any JSON value, or `WithHeaders`.

        The same request gives the same body, whatever else is in the batch. Cancelling the call stops the work. A
        stream that is asked of what cannot stream is a `BadRequest` of `options.stream`.

        Raises:
            RequestError: the request is answered with this error (`BadRequest`, `Missing`, `RequestTooLarge`).
            RetryableError: the request comes back later (`Failed`, `Unavailable`).
            EngineGone: the engine will not come back.
        """

    async def wait_gone(self) -> None:
        """Return only when the engine has died too often to come back; for an engine that cannot, never."""

    async def stop(self) -> None:
        """Free everything. Calls still running raise `Unavailable`. Idempotent."""
