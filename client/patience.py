"""How often and how long the client tries again while a broker is away."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from rejoinder.adapters import Transient

T = TypeVar("T")

RETRIES = 5
"""With the delays below: gives a broker about 5 s to come back, then says so, since a person may be waiting."""
FIRST_DELAY = 0.2
LONGEST_DELAY = 5.0


def delays() -> Iterator[float]:
    """Seconds to wait before each further try, none left at the end. Jittered, so that clients do not march in step."""
    for retry in range(RETRIES):
        yield min(FIRST_DELAY * 2**retry, LONGEST_DELAY) * random.uniform(0.5, 1.0)  # noqa: S311  # no secret


async def to_its_end(call: Awaitable[T]) -> T:
    """Await `call` to its end even when cancelled meanwhile: half an ack is no ack."""
    task = asyncio.ensure_future(call)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Await `call()`, and again a few times while it is `Transient`.

    Raises:
        AdapterError: the last try's, or the first that is not `Transient`.
    """
    for delay in delays():
        try:
            return await call()
        except Transient:
            await asyncio.sleep(delay)
    return await call()
