"""One keeper renews the lease of every message held, waiting or running, on whichever broker."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import structlog

from rejoinder.adapters import AdapterError, Denied, LeaseLost, Message, NotFound, Subscription, Transient
from rejoinder.worker.retry import CALL_SECONDS

log = structlog.get_logger(__name__)

# A renewal that the broker could not take is tried again this soon, so that a third of a lease gives several tries.
RETRY_SECONDS = 0.5
# Leases renewed in one call of the adapter, and such calls at once. One that hangs keeps back no other leases than its
# own, and what the adapter makes of it (50 calls on SQS) is done before an ack behind it has waited for long.
CHUNK = 500
CALLS = 4


@dataclass(slots=True, eq=False)
class Lease:
    """What the keeper knows of one held message."""

    message: Message
    on_lost: Callable[[], None]
    ends: float
    """The loop's time at which it ends, if it is not renewed by then."""
    renew_until: float
    """The loop's time after which it is not renewed any more."""
    held_until: float
    """The loop's time at which the broker ends it, however often it is renewed."""
    released: bool = False
    renewal: asyncio.Task[None] | None = None
    """The call under way that renews it."""


class LeaseKeeper:
    """Renews at a third of the lease: two renewals may fail before one lease runs out.

    Every lease of a subscription has the same length, so leases fall due nearly in the order in which they were last
    set: two ordered dicts, due time by lease, give the next one without a heap, and let go of one at once. (Nearly: one
    received by a long poll counts from its beginning, and may stand behind others by that much. A lease is three times
    as long as a period, which covers it.)

    Args:
        subscription: Whose leases.
        max_hold: Seconds after which a message is renewed no more, whatever becomes of it: work that never ends must
            not keep it for ever. At most what the broker allows.
    """

    def __init__(self, subscription: Subscription, max_hold: float) -> None:
        self._subscription = subscription
        self._max_hold = min(max_hold, subscription.max_hold_seconds)
        self._seconds = subscription.lease_seconds
        self._period = self._seconds / 3
        self._due: dict[Lease, float] = {}
        self._failed: dict[Lease, float] = {}
        self._renewals: dict[asyncio.Task[None], None] = {}
        self._refused: BaseException | None = None
        self._changed = asyncio.Event()
        self._clock = asyncio.get_running_loop().time

    def hold(self, message: Message, received: float, on_lost: Callable[[], None]) -> Lease:
        """Keep the lease of `message` alive until `release`.

        Args:
            message: A delivery just received.
            received: The loop's time just before it was asked for: its lease began no earlier.
            on_lost: Called once if the lease is found to have passed to somebody else.
        """
        now = self._clock()
        held_until = now + self._subscription.max_hold_seconds
        lease = Lease(message, on_lost, received + self._seconds, now + self._max_hold, held_until)
        if not self._due and not self._failed:
            self._changed.set()
        self._due[lease] = received + self._period
        return lease

    def release(self, lease: Lease) -> None:
        """Renew it no more. The broker is not told."""
        self._due.pop(lease, None)
        self._failed.pop(lease, None)
        lease.released = True
        # What it calls knows the lease: a circle, which would keep every message until the collector comes by.
        lease.on_lost = _nobody

    async def quiet(self, leases: Iterable[Lease], limit: float | None = None) -> None:
        """Wait for the renewals of released leases that are under way: they would undo what the broker is told next.

        Args:
            leases: Released ones.
            limit: Seconds to wait for. Default: as long as a renewal may take.
        """
        renewals = {lease.renewal for lease in leases if lease.renewal is not None}
        if renewals:
            await asyncio.wait(renewals, timeout=limit)

    async def confirm(self, lease: Lease) -> bool:
        """Whether the lease is still ours. Asks the broker only if it may have ended: after a suspended process, say.

        A broker that cannot be asked is believed to have kept it: at worst an answer is given twice, never none.
        """
        if self._clock() < lease.ends:
            return True
        (outcome,) = await self._set([lease])
        return not isinstance(outcome, LeaseLost)

    async def run(self) -> None:
        """Renew what falls due, for ever. Must run on a loop that nothing blocks.

        Raises:
            AdapterError: the broker refuses renewals for good.
        """
        try:
            while self._refused is None:
                wait = self._start_due()
                self._changed.clear()
                # Not wait_for: until Python 3.12 it drops a cancellation that comes in the turn of what it waits for.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._changed.wait()
            raise self._refused
        finally:
            for renewal in self._renewals:
                renewal.cancel()
            if self._renewals:
                await asyncio.wait(list(self._renewals))

    def _start_due(self) -> float | None:
        """Start renewing what is due; return for how many seconds nothing more is to be started, None for ever."""
        now = self._clock()
        while len(self._renewals) < CALLS:
            first = min((due for queue in (self._failed, self._due) for due in islice(queue.values(), 1)), default=None)
            if first is None or first > now:
                return None if first is None else first - now
            if leases := self._taken(now):
                renewal = asyncio.create_task(self._renew(leases))
                for lease in leases:
                    lease.renewal = renewal
                self._renewals[renewal] = None
                renewal.add_done_callback(self._on_renewed)
        return None  # the end of any of them is waited for

    def _taken(self, now: float) -> list[Lease]:
        """Take out what is due, up to a chunk of it."""
        # What falls due within a tenth of the period goes along: fewer, larger calls.
        horizon = now + self._period / 10
        leases: list[Lease] = []
        for queue, until in ((self._failed, now), (self._due, horizon)):
            while queue and len(leases) < CHUNK:
                lease, due = next(iter(queue.items()))
                if due > until:
                    break
                del queue[lease]
                if lease.renew_until < now:
                    log.error("lease_held_too_long", message_id=lease.message.id)
                    lease.on_lost()
                else:
                    leases.append(lease)
        return leases

    async def _renew(self, leases: Sequence[Lease]) -> None:
        asked = self._clock()
        outcomes = await self._set(leases)
        again = self._clock() + min(RETRY_SECONDS, self._period / 4)
        refused: AdapterError | None = None
        failed: list[AdapterError] = []
        for lease, outcome in zip(leases, outcomes, strict=True):
            lease.renewal = None
            if lease.released:
                continue
            if outcome is None:
                lease.ends = min(asked + self._seconds, lease.held_until)
                self._due[lease] = asked + self._period
            elif isinstance(outcome, LeaseLost):
                lease.on_lost()
            elif isinstance(outcome, Denied | NotFound):
                refused = outcome
            else:
                failed.append(outcome)
                self._failed[lease] = again
        if failed:  # one line for all: thousands may wait for one broker
            log.warning("lease_renewal_failed", messages=len(failed), error=str(failed[0]))
        if refused is not None:
            raise refused  # for good: without renewals every lease would be lost

    def _on_renewed(self, renewal: asyncio.Task[None]) -> None:
        del self._renewals[renewal]
        if not renewal.cancelled() and (exc := renewal.exception()) is not None:
            self._refused = exc
        self._changed.set()

    async def _set(self, leases: Sequence[Lease]) -> Sequence[AdapterError | None]:
        try:
            # A call that never answers must not stop all later renewals.
            async with asyncio.timeout(min(self._period, CALL_SECONDS)):
                return await self._subscription.set_lease([lease.message for lease in leases], self._seconds)
        except (Transient, TimeoutError) as exc:
            return [Transient(str(exc) or "the broker did not answer")] * len(leases)


def _nobody() -> None:
    """A lease that was released is lost by nobody."""
