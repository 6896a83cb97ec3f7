"""When to try again, and when to stop: the one place that knows tenacity."""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import structlog
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    retry_if_result,
    stop_after_delay,
    stop_never,
    wait_random_exponential,
)

from rejoinder.adapters import AdapterError, Transient

Action = Literal["retry", "answer_and_ack", "answer_and_leave"]

Item = TypeVar("Item")
Success = TypeVar("Success")

log = structlog.get_logger(__name__)

# A broker that is away is asked again after 0.1 s at first and every 10 s at most: soon enough that a short outage
# costs little, seldom enough that a long one is no storm when it ends.
_BACKOFF_FIRST = 0.1
_BACKOFF_MAX = 10.0
_BACKOFF = wait_random_exponential(multiplier=_BACKOFF_FIRST, max=_BACKOFF_MAX)
# Adapters watch their own calls; one that does not return in this time all the same is taken for lost and tried again.
CALL_SECONDS = 60.0

# Thousands of answers may wait for one broker, each trying by itself: one line a second for each kind of call.
_WARN_SECONDS = 1.0
_warned: dict[str, float] = {}


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How failed requests come back."""

    max_attempts: int
    """Deliveries before the last error is answered."""
    dead_letter_after: int | None
    """Deliveries after which the queue's own policy takes the message away; None without such a policy."""
    delay: float
    """Seconds before the second attempt."""
    delay_max: float

    @property
    def cap(self) -> int:
        """The delivery whose failure is answered."""
        return self.max_attempts if self.dead_letter_after is None else min(self.max_attempts, self.dead_letter_after)

    def backoff(self, attempt: int) -> float:
        """Seconds until the next attempt: exponential, jittered, capped."""
        ceiling = min(self.delay_max, self.delay * 2.0 ** min(attempt - 1, 60))
        return ceiling * random.uniform(0.5, 1.0)  # noqa: S311 - spreading load, not secrets

    def delay_of(self, error: Exception | None, attempt: int) -> float:
        """Seconds until the next attempt after `error`: what it asks for, else `backoff`."""
        asked = getattr(error, "delay", None)
        return self.backoff(attempt) if asked is None else max(0.0, asked)

    def on_failure(self, attempt: int) -> Action:
        """What becomes of a delivery that failed with a retryable error."""
        if attempt < self.cap:
            return "retry"
        # After the last error is answered, a message that the queue's policy takes is left to it: at once, or, as on
        # Pub/Sub, soon. One that still comes after as many deliveries more is not taken, as where Pub/Sub may not
        # publish to the dead-letter topic, and would be answered for ever.
        leave = self.dead_letter_after is not None and self.dead_letter_after <= attempt <= 2 * self.dead_letter_after
        return "answer_and_leave" if leave else "answer_and_ack"

    def exhausted(self, attempt: int | None) -> bool:
        """Whether to give a message up without running it.

        A delivery past the cap means that earlier ones ended unseen, with their worker or their lease. One of them may
        have answered and lost only its ack, and then running it again says the same while giving up would contradict
        it. So it is run again, up to as many deliveries more: what kills its worker each time comes to an end too.
        Only the broker's own count tells of such deliveries; None: it does not count.
        """
        return attempt is not None and attempt > 2 * self.cap


def _warn(what: str) -> Callable[[RetryCallState], None]:
    def before_sleep(state: RetryCallState) -> None:
        now = time.monotonic()
        if now < _warned.get(what, -math.inf) + _WARN_SECONDS:
            return
        _warned[what] = now
        outcome = state.outcome
        error = None if outcome is None else outcome.exception() if outcome.failed else outcome.result()
        log.warning(
            "broker_retry",
            call=what,
            error=str(error) if isinstance(error, BaseException) else "some entries failed",
            tries=state.attempt_number,
            next_in=round(state.upcoming_sleep, 2),
        )

    return before_sleep


class Backoff:
    """Pauses between tries that several tasks share, as long as those of the functions below.

    Args:
        what: The call's name, for the log.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._tries = 0

    def failed(self, exc: AdapterError) -> float:
        """A try failed; return the seconds until the next."""
        pause = random.uniform(0.0, min(_BACKOFF_MAX, _BACKOFF_FIRST * 2.0 ** min(self._tries, 60)))  # noqa: S311
        self._tries += 1
        log.warning("broker_retry", call=self._what, error=str(exc), tries=self._tries, next_in=round(pause, 2))
        return pause

    def succeeded(self) -> None:
        """The broker is there."""
        self._tries = 0


async def bounded(call: Awaitable[Success], *, beyond: float = 0.0) -> Success:
    """Await a broker's call for `CALL_SECONDS` at most, and `beyond` that for the time that it is asked to wait.

    Raises:
        Transient: it did not return.
    """
    try:
        async with asyncio.timeout(CALL_SECONDS + beyond):
            return await call
    except TimeoutError as exc:
        raise Transient("it did not answer") from exc


async def call_until(what: str, call: Callable[[], Awaitable[Success]], *, limit: float | None = None) -> Success:
    """Call until it raises nothing `Transient`, with backoff.

    Args:
        what: The call's name, for the log.
        call: One try.
        limit: Seconds after which the last `Transient` is raised; None: never.
    """

    async def one_try() -> Success:  # tenacity awaits what is declared async, not what returns an awaitable
        return await call()

    retrying = AsyncRetrying(
        retry=retry_if_exception_type(Transient),
        wait=_BACKOFF,
        stop=stop_never if limit is None else stop_after_delay(limit),
        before_sleep=_warn(what),
        reraise=True,
    )
    return await retrying(one_try)


async def entry_until(
    what: str, submit: Callable[[], Awaitable[Success | AdapterError]], *, limit: float | None = None
) -> Success | AdapterError:
    """Submit one entry until its outcome is not `Transient`, with backoff; return that outcome.

    Each entry is tried again by itself: one that the broker never takes holds up no other.

    Args:
        what: The call's name, for the log.
        submit: One try.
        limit: Seconds after which a `Transient` outcome is returned; None: never.
    """
    outcome = await submit()
    if not isinstance(outcome, Transient):  # the usual case, without tenacity's machinery
        return outcome

    async def one_try() -> Success | AdapterError:
        return await submit()

    retrying = AsyncRetrying(
        retry=retry_if_result(lambda result: isinstance(result, Transient)),
        wait=_BACKOFF,
        stop=stop_never if limit is None else stop_after_delay(limit),
        before_sleep=_warn(what),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome is not None else None,
    )
    result: Success | AdapterError = await retrying(one_try)
    return result


async def each_until(
    what: str,
    call: Callable[[Sequence[Item]], Awaitable[list[Success | AdapterError]]],
    items: Sequence[Item],
    *,
    limit: float | None = None,
) -> list[Success | AdapterError]:
    """Call with a batch until no entry's outcome is `Transient`; only such entries are tried again.

    Returns one outcome for each item, in order; after `limit` seconds the transient ones stand as they are.
    """
    outcomes: dict[int, Success | AdapterError] = {}

    async def one_try() -> bool:
        left = [i for i in range(len(items)) if i not in outcomes or isinstance(outcomes[i], Transient)]
        try:
            results: list[Success | AdapterError] = await call([items[i] for i in left])
        except Transient as exc:
            results = [exc] * len(left)
        outcomes.update(zip(left, results, strict=True))
        return any(isinstance(result, Transient) for result in results)

    if not await one_try():  # the usual case, without tenacity's machinery
        return [outcomes[i] for i in range(len(items))]
    retrying = AsyncRetrying(
        retry=retry_if_result(bool),
        wait=_BACKOFF,
        stop=stop_never if limit is None else stop_after_delay(limit),
        before_sleep=_warn(what),
        retry_error_callback=lambda _: True,
    )
    await retrying(one_try)
    return [outcomes[i] for i in range(len(items))]
