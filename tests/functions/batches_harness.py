"""Functions for dynamic batches, and what became of a submission."""

import asyncio

from rejoinder.worker.engines.functions.batches import Batches, BatchLimits


class Function:
    """Answers after so many seconds, like a coroutine or, `deaf`, like a thread that nobody can stop."""

    def __init__(self, seconds, *, deaf=False):
        self.seconds = seconds
        self.deaf = deaf
        self.calls = []
        self.ended = []
        self.cancelled = 0

    async def __call__(self, items):
        loop = asyncio.get_running_loop()
        self.calls.append((loop.time(), list(items)))
        end = loop.time() + self.seconds
        while loop.time() < end:
            try:
                await asyncio.sleep(end - loop.time())
            except asyncio.CancelledError:
                self.cancelled += 1
                if not self.deaf:
                    raise
        self.ended.append(loop.time())
        return list(items)


def batches_of(function, size=4, *, wait=0.0, **options):
    return Batches(function, BatchLimits(size, 1 << 20, wait), **options)


async def outcome(task):
    """How it ended, and when."""
    try:
        result = await task
    except (asyncio.CancelledError, Exception) as exc:  # noqa: BLE001
        result = type(exc)
    return asyncio.get_running_loop().time(), result


def submitted(loop, batches, count):
    return [loop.create_task(batches.submit(item)) for item in range(count)]
