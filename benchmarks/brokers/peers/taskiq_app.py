"""taskiq-aio-sqs as its users run it: `python taskiq_app.py fill` and `python taskiq_app.py work`.

The answer is a task of another broker, whose queue is the response queue. Sends are batched by the broker itself, which
acks a request before its answer is sent: faster, and a crash loses what is in the batch.
"""

import asyncio
import os
import sys

from taskiq import TaskiqEvents, TaskiqState
from taskiq_aio_sqs import SQSBroker

requests = SQSBroker(os.environ["REQUESTS"], max_number_of_messages=10)
responses = SQSBroker(os.environ["RESPONSES"], enable_batching=True, batch_timeout=0.1)


@responses.task(task_name="answered")
async def answered(body: str) -> None:
    """What would run on the other side; nobody does here."""


@requests.task(task_name="echo")
async def echo(body: str) -> None:
    """Answer with the body."""
    await answered.kiq(body)


@requests.on_event(TaskiqEvents.WORKER_STARTUP)
async def start(_: TaskiqState) -> None:
    """Open the way back."""
    await responses.startup()


@requests.on_event(TaskiqEvents.WORKER_SHUTDOWN)
async def stop(_: TaskiqState) -> None:
    """Close the way back."""
    await responses.shutdown()


async def fill(messages: int) -> None:
    """Send the backlog."""
    await requests.startup()
    for start_at in range(0, messages, 100):
        await asyncio.gather(*(echo.kiq(f"hello {n}") for n in range(start_at, min(start_at + 100, messages))))
    await requests.shutdown()


if __name__ == "__main__":
    if sys.argv[1] == "fill":
        asyncio.run(fill(int(os.environ["MESSAGES"])))
    else:
        command = [sys.executable, "-m", "taskiq", "worker", "taskiq_app:requests", "--log-level", "WARNING"]
        os.execv(sys.executable, command + sys.argv[2:])
