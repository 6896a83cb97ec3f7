"""What the two embedded brokers, `memory` and `sqlite`, share: their URL options, their limits, their outcomes."""

from collections.abc import Mapping
from dataclasses import dataclass

from rejoinder.adapters.driver import NO_POINTERS, Outgoing
from rejoinder.adapters.errors import BadURL, LeaseLost, TooLarge
from rejoinder.adapters.urls import integer, number

DEFAULT_LEASE = 30.0
MIN_LEASE = 0.1
"""Below this, a busy event loop loses leases that it is renewing. Short leases are for tests."""
MAX_LEASE = 7 * 86_400.0
"""Nothing here limits a lease; a week keeps a slip of the unit (milliseconds) from hiding a message for ever."""
MAX_BODY = 64 * 1024 * 1024
"""A queue of larger bodies belongs in a blob store: every receive holds its bodies in memory, whole."""
MAX_KEYS = 500
"""Nothing here limits a publish but that it is one transaction."""
MAX_RECEIVE = 10_000
"""One receive is one transaction, and one step of the event loop."""
RECEIVE_BYTES = 64 * 1024 * 1024
"""Of bodies in one receive, about: it ends with the message that reaches this, whatever its limit."""

OPTIONS: Mapping[str, str] = {
    "lease": f"seconds, {DEFAULT_LEASE:g} by default",
    "max_attempts": "deliveries before a message moves to the dead-letter queue; no limit by default",
    "dead_letter": "name of the dead-letter queue; the queue's own with '-dead' when only max_attempts is given",
}


@dataclass(frozen=True, slots=True)
class Options:
    """How one opener reads a queue. Two openers of one queue may differ; each delivery follows its receiver's."""

    lease: float
    max_attempts: int | None
    dead_letter: str | None

    @classmethod
    def parse(cls, url: str, query: Mapping[str, str], queue: str) -> "Options":
        """Read the options of `queue` from the query of `url`.

        Raises:
            BadURL: a value is out of range, or the dead-letter policy makes no sense.
        """
        lease = number(url, query, "lease", DEFAULT_LEASE, low=MIN_LEASE, high=MAX_LEASE)
        if "max_attempts" not in query:
            if "dead_letter" in query:
                raise BadURL(f"parameter 'dead_letter' needs 'max_attempts' beside it in {url!r}")
            return cls(lease, None, None)
        max_attempts = integer(url, query, "max_attempts", 1, low=1, high=1_000_000)
        dead_letter = query.get("dead_letter", f"{queue}-dead")
        if dead_letter == queue:
            raise BadURL(f"parameter 'dead_letter' must name another queue than {queue!r} in {url!r}")
        return cls(lease, max_attempts, dead_letter)


def too_large(outgoing: Outgoing) -> TooLarge | None:
    """Return the outcome of publishing `outgoing` where its body is over `MAX_BODY`, else None.

    Raises:
        ValueError: it is a pointer.
    """
    if outgoing.stored_at is not None:
        raise ValueError(NO_POINTERS)
    size = len(outgoing.body)
    return TooLarge(f"the body has {size} bytes, over the {MAX_BODY} of this broker") if size > MAX_BODY else None


def lease_lost(message_id: str, attempt: int) -> LeaseLost:
    """Return the outcome of settling a delivery that is no longer the latest one of its message."""
    return LeaseLost(f"delivery {attempt} of message {message_id} has been followed by another, or the message is gone")


def checked_limit(limit: int) -> int:
    """Return how many messages a `receive` takes at most. Raises ValueError below one."""
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    return min(limit, MAX_RECEIVE)


def check_seconds(seconds: float) -> None:
    """Refuse a `set_lease` outside 0..`MAX_LEASE` with ValueError; also a NaN."""
    if not 0 <= seconds <= MAX_LEASE:
        raise ValueError(f"seconds must be from 0 to {MAX_LEASE:g}, not {seconds}")
