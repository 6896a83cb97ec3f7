"""The answers to a message of several requests, such as an S3 event of several records."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from rejoinder.worker.accepting import Part, Several
from rejoinder.worker.handler import Answered

# One message can name thousands of objects; whatever each takes, no more of them are under way.
AT_ONCE = 64


async def all_answers(several: Several, run: Callable[[Part], Awaitable[Answered]]) -> Answered:
    """Run the requests of one message side by side, and return their answers as one.

    Raises:
        Whatever `run` raises, after the others were stopped.
    """
    free = asyncio.Semaphore(AT_ONCE)

    async def one(part: Part) -> Answered:
        async with free:
            # Each its own: the message's name is shared by all.
            done = await run(part)
            return replace(done, answer=replace(done.answer, named_by_message=True))

    tasks = [asyncio.create_task(one(part)) for part in several.parts]
    try:
        answers = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    first = next((one for one in answers if one.answer.retryable), answers[0])
    others = tuple(one for one in answers if one is not first)
    return replace(first, answer=replace(first.answer, also=others))
