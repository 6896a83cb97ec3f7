"""What `rejoinder doctor` asks of an adapter: look at a queue, subscription or topic, and say what is to be done.

The checks of an adapter are in a module beside it (`sqlite` -> `sqlite_checkup`), imported only here and only then:

    async def check_subscription(url: str) -> Checkup
    async def check_topic(url: str) -> Checkup

A check touches no message: it receives none, since that counts as an attempt, and publishes none. What it is there to
find out it never raises: a denied permission or a broker that is away is a finding.
"""

import asyncio
from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from rejoinder.adapters.driver import Backlog
from rejoinder.adapters.errors import Transient

T = TypeVar("T")

CALL_SECONDS = 5.0
"""Of one question to a broker. One that is there answers in milliseconds; a person waits for this."""

State = Literal["ok", "advice", "fail", "unknown"]
"""`advice`: works, and could be better. `fail`: the worker would not work, or would lose something. `unknown`: it
cannot be found out without touching a message, or nobody here may ask."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """What was looked at, in the field's terms: `reachable`, `lease`, `dead-letter policy`."""
    state: State
    fact: str
    """What was seen."""
    todo: str = ""
    """What to do about it: the very command, setting or permission. Empty where there is nothing to do."""


@dataclass(frozen=True, slots=True)
class Checkup:
    """What was found out about one URL. What could not be found out is None or empty."""

    findings: list[Finding]
    ends: frozenset[str] = frozenset()
    """Names of what the messages come from (a subscription: its topic or queue) or go to (a topic: itself, and what is
    known to be subscribed to it): where those of requests and responses overlap, answers are taken for requests."""
    max_attempts: int | None = None
    """Deliveries before the broker takes a message away."""
    max_hold: float | None = None
    """Seconds after its receipt for which a message can be held."""
    max_body: int | None = None
    """Bytes of the largest message."""


class CheckupModule(Protocol):
    """What an adapter's module of checks offers."""

    def check_subscription(self, url: str, /) -> Coroutine[Any, Any, Checkup]:
        """Look at the receiving end that `url` names."""

    def check_topic(self, url: str, /) -> Coroutine[Any, Any, Checkup]:
        """Look at the sending end that `url` names."""


def ok(check: str, fact: str) -> Finding:
    """Return that there is nothing to do."""
    return Finding(check, "ok", fact)


def advice(check: str, fact: str, todo: str) -> Finding:
    """Return what would be better."""
    return Finding(check, "advice", fact, todo)


def fail(check: str, fact: str, todo: str) -> Finding:
    """Return what must be done."""
    return Finding(check, "fail", fact, todo)


def unknown(check: str, fact: str, todo: str = "") -> Finding:
    """Return what could not be found out."""
    return Finding(check, "unknown", fact, todo)


async def ask(call: Awaitable[T], seconds: float = CALL_SECONDS) -> T:
    """Await one question to a broker, for `seconds` at most.

    Raises:
        Transient: there was no answer in time.
        AdapterError: as the broker says.
    """
    try:
        async with asyncio.timeout(seconds):
            return await call
    except TimeoutError as exc:
        raise Transient(f"no answer within {seconds:g} s") from exc


SHORT_LEASE = 30.0
"""Leases are renewed at a third: below this, a broker that is busy for ten seconds costs leases."""
LONG_LEASE = 600.0
"""The work of a worker that was killed waits for the end of its lease."""
FEW_ATTEMPTS = 3
"""A worker that stops, or is killed, hands its requests back, and each time counts as an attempt."""


def lease(seconds: float, change: str) -> Finding:
    """Judge the lease; `change` is how another is set, with `60` for the seconds."""
    fact = f"{seconds:g} s, renewed every {seconds / 3:.3g} s"
    if seconds < SHORT_LEASE:
        return advice("lease", f"{fact}: a pause of the broker or the network that long loses it", change)
    if seconds > LONG_LEASE:
        return advice("lease", f"{fact}: the requests of a worker that was killed wait that long", change)
    return ok("lease", fact)


def attempts(count: int, where: str, change: str) -> Finding:
    """Judge after how many deliveries a message moves to the dead-letter queue `where`."""
    fact = f"after {count} deliveries to {where}"
    if count < FEW_ATTEMPTS:
        return advice("dead-letter policy", f"{fact}: being handed back by a worker that stops counts as one", change)
    return ok("dead-letter policy", fact)


def no_dead_letters(change: str) -> Finding:
    """Say that nothing keeps what fails again and again; `change` is how to get that."""
    return advice("dead-letter policy", "none: a request that fails for good is answered, and kept nowhere", change)


def counts(backlog: Backlog, look: str) -> list[Finding]:
    """Say how much a subscription holds; `look` is how to see the dead ones."""
    fact = f"{backlog.waiting} waiting, {backlog.held} held or delayed"
    found = [ok("messages", fact)]
    if backlog.dead:
        found.append(advice("dead letters", f"{backlog.dead} in the dead-letter queue", look))
    return found
