"""What an adapter or a whole worker opens, it closes: tasks, threads and sockets are as before."""

import asyncio
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable

import psutil
from answers import check_answers, envelopes
from broker_pairs import Pair, on
from pairs import LIMIT, Queues

from rejoinder.adapters import Outgoing, open_subscription, open_topic
from rejoinder.worker.service import StopSignals, serve
from rejoinder.worker.settings import Settings

ROUNDS = 2


def held() -> Counter[str]:
    """What this process has open, less the few threads that asyncio keeps for `to_thread`.

    gRPC ends its thread with the last channel and numbers the next one anew.
    """
    tasks = [repr(task.get_coro()) for task in asyncio.all_tasks() - {asyncio.current_task()}]
    threads = [re.sub(r"\d+", "N", thread.name) for thread in threading.enumerate() if "asyncio_" not in thread.name]
    return Counter([*tasks, *threads, *map(repr, psutil.Process().net_connections("inet"))])


async def check_back_at(before: Counter[str], limit: float = 60.0) -> None:
    """Nothing is open that was not before. Sockets may take a turn of the loop to go."""
    deadline = time.monotonic() + limit
    while extra := held() - before:
        assert time.monotonic() < deadline, extra
        await asyncio.sleep(0.05)


async def send_and_receive(queues: Queues) -> None:
    async with open_topic(queues.responses) as topic, open_subscription(queues.inbox) as subscription:
        assert isinstance((await topic.publish([Outgoing(b"x")]))[0], str)
        messages = await subscription.receive(10, LIMIT)
        assert await subscription.ack(messages) == [None]
        receiving = asyncio.create_task(subscription.receive(10, 20))
        await asyncio.sleep(0.05)  # so that the poll has been sent when it is given up
        receiving.cancel()
        await asyncio.wait({receiving})


@on("sqs", "sqs>sns", "pubsub")
async def test_an_adapter_closes_what_it_opened(pair: Pair) -> None:
    # New queues each time: the Pub/Sub emulator may answer a poll that was given up, with messages of the next round.
    await send_and_receive(await pair.queues())  # what a library keeps for good once it is used
    before = held()
    for _ in range(ROUNDS):
        await send_and_receive(await pair.queues())
    await check_back_at(before)


async def work(queues: Queues, numbers: Iterable[int]) -> None:
    signals = StopSignals()
    settings = Settings(requests=queues.requests, responses=queues.responses, engine="echo")
    worker = asyncio.create_task(serve(settings, signals))
    bodies = envelopes(max(numbers) + 1)
    await queues.send(*(bodies[n] for n in numbers))
    check_answers(await queues.receive(len([*numbers])), numbers)
    signals.receive("SIGTERM")
    await asyncio.wait_for(worker, 60)


@on("sqs>sns", "pubsub")
async def test_a_worker_closes_what_it_opened(pair: Pair) -> None:
    queues = await pair.queues()
    await work(queues, range(20))
    before = held()
    await work(queues, range(20, 40))
    await check_back_at(before)
