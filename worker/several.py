"""The answers to a message of several requests, such as an S3 event of several records."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from rejoinder.worker.handler import Answer, Part, Several

# One message can name thousands of objects; whatever each takes, no more of them are under way.
AT_ONCE = 64


async def all_answers(several: Several, run: Callable[[Part], Awaitable[Answer]]) -> Answer:
    """Run the requests of one message side by side, and return their answers as one.

    Raises:
        Whatever `run` raises, after the others were stopped.
    """
    free = asyncio.Semaphore(AT_ONCE)

    async def one(part: Part) -> Answer:
        async with free:
            # Each its own: the message's name is shared by all.
            return replace(await run(part), named_by_message=True)

    tasks = [asyncio.create_task(one(part)) for part in several.parts]
    try:
        answers = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    first = next((answer for answer in answers if answer.retryable), answers[0])
    return replace(first, also=tuple(answer for answer in answers if answer is not first))
