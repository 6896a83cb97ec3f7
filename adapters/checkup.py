"""What `rejoinder doctor` asks of an adapter: look at a queue, subscription or topic, and say what is to be done.

The checks of an adapter are in a module beside it (`sqlite` -> `sqlite_checkup`), imported only here and only then:

    async def check_subscription(url: str) -> list[Finding]
    async def check_topic(url: str) -> list[Finding]

A check touches no message: it receives none, since that counts as an attempt, and publishes none. What it is there to
find out it never raises: a denied permission or a broker that is away is a finding.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from rejoinder.adapters.errors import AdapterError, BadURL, Transient

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


class CheckupModule(Protocol):
    """What an adapter's module of checks offers."""

    def check_subscription(self, url: str, /) -> Coroutine[Any, Any, list[Finding]]:
        """Look at the receiving end that `url` names."""

    def check_topic(self, url: str, /) -> Coroutine[Any, Any, list[Finding]]:
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


async def looked_at(look: Callable[[], Awaitable[list[Finding]]], *, todo: str) -> list[Finding]:
    """Return what `look` finds; where it fails as a whole, that it cannot be reached, and what to do (`todo`).

    Raises:
        BadURL: the caller's mistake, not a finding.
    """
    try:
        return await look()
    except BadURL:
        raise
    except AdapterError as exc:
        return [fail("reachable", str(exc) or type(exc).__name__, todo)]
