"""One keeper renews the lease of every message held, waiting or running, on whichever broker."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from rejoinder.adapters import AdapterError, Denied, LeaseLost, Message, NotFound, Subscription, Transient

log = structlog.get_logger(__name__)

# A renewal that the broker could not take is tried again this soon, so that a third of a lease gives several tries.
RETRY_SECONDS = 0.5


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
        self._changed = asyncio.Event()
        self._clock = asyncio.get_running_loop().time

    def __len__(self) -> int:
        return len(self._due) + len(self._failed)

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
        self._drop(lease)
        # What it calls knows the lease: a circle, which would keep every message until the collector comes by.
        lease.on_lost = _nobody

    def _drop(self, lease: Lease) -> None:
        self._due.pop(lease, None)
        self._failed.pop(lease, None)

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
        while True:
            now = self._clock()
            # What falls due within a tenth of the period goes along: fewer, larger calls.
            horizon = now + self._period / 10
            ready = [lease for lease, due in self._failed.items() if due <= now]
            for lease, due in self._due.items():
                if due > horizon:
                    break
                ready.append(lease)
            if ready and self._next() <= now:
                await self._renew(ready)
                continue
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), None if not len(self) else max(0.0, self._next() - now))
            except TimeoutError:
                continue

    def _next(self) -> float:
        first = next(iter(self._due.values()), float("inf"))
        return min(first, min(self._failed.values(), default=float("inf")))

    async def _renew(self, leases: Sequence[Lease]) -> None:
        asked = self._clock()
        for lease in leases:
            if lease.renew_until < asked:
                log.error("lease_held_too_long", message_id=lease.message.id)
                self._drop(lease)
                lease.on_lost()
        leases = [lease for lease in leases if lease.renew_until >= asked]
        outcomes = await self._set(leases) if leases else []
        for lease, outcome in zip(leases, outcomes, strict=True):
            if lease not in self._due and lease not in self._failed:
                continue  # released while the call was under way
            self._drop(lease)
            if outcome is None:
                lease.ends = min(asked + self._seconds, lease.held_until)
                self._due[lease] = asked + self._period
            elif isinstance(outcome, LeaseLost):
                lease.on_lost()
            elif isinstance(outcome, Denied | NotFound):
                raise outcome  # for good: without renewals every lease would be lost
            else:
                log.warning("lease_renewal_failed", message_id=lease.message.id, error=str(outcome))
                self._failed[lease] = self._clock() + RETRY_SECONDS

    async def _set(self, leases: Sequence[Lease]) -> Sequence[AdapterError | None]:
        try:
            # A call that never answers must not stop all later renewals.
            async with asyncio.timeout(self._period):
                return await self._subscription.set_lease([lease.message for lease in leases], self._seconds)
        except (Transient, TimeoutError) as exc:
            return [Transient(str(exc) or "the broker did not answer")] * len(leases)


def _nobody() -> None:
    """A lease that was released is lost by nobody."""
