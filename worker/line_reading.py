"""The lines of an object that is too large to be held."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import structlog

from rejoinder.worker.errors import BadRequest, Unavailable
from rejoinder.worker.inputs import Source
from rejoinder.worker.retry import RetryPolicy

log = structlog.get_logger(__name__)

# Split at once: short lines take many times their length as objects.
SLICE = 64 * 1024


async def steadily(source: Source, policy: RetryPolicy) -> AsyncGenerator[bytes]:
    """An object's bytes, also if its store breaks off in between.

    Then the object is opened again and what was read before is passed over: that is cheaper than to run hours of lines
    once more.

    Raises:
        RequestError: as `Source.opened`; `Unavailable` after `max_attempts` tries without a byte in between.
        BadRequest: another object stands there now.
    """
    done, size, failures = 0, -1, 0
    while True:
        try:
            async with source.opened() as blob:
                if size not in {-1, blob.size}:
                    raise BadRequest(f"{source.location} was changed while it was read", param=source.param)
                size, passed = blob.size, 0
                async for chunk in blob.chunks:
                    fresh = chunk[max(0, done - passed) :]
                    passed += len(chunk)
                    if fresh:
                        done, failures = passed, 0
                        yield fresh
                return
        except Unavailable as exc:
            failures += 1
            if failures >= policy.max_attempts:
                raise
            pause = policy.backoff(failures)
            log.warning("input_broke_off", location=source.location, at=done, error=str(exc), next_in=round(pause, 2))
            await asyncio.sleep(pause)


async def split(chunks: AsyncIterator[bytes], limit: int) -> AsyncGenerator[bytes | None]:
    """The lines of a stream that are not blank, without their ends; None for one of more than `limit` bytes."""
    rest, too_long = bytearray(), False
    async for chunk in chunks:
        for start in range(0, len(chunk), SLICE):
            for at, part in enumerate(chunk[start : start + SLICE].split(b"\n")):
                if at:  # a line's end stands before it
                    if too_long or not _blank(rest):
                        yield None if too_long else bytes(rest)
                    rest, too_long = bytearray(), False
                if not too_long:
                    rest += part
                    if len(rest) > limit:  # and no more of it is kept
                        rest, too_long = bytearray(), True
    if too_long or not _blank(rest):
        yield None if too_long else bytes(rest)


def _blank(line: bytearray) -> bool:
    return not line or line.isspace()
