"""SQS as the benchmark sees it: queues, backlogs, the clock of the responses, and the bare loop on aiobotocore."""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

from benchmarks.clouds import REGION
from rejoinder.adapters.aws_wire import SYSTEM_ATTRIBUTES

BATCH = 10
RESPONSE_ID = 32 * "a"
COUNTERS = 4


@asynccontextmanager
async def client(connections: int = 10) -> AsyncIterator[Any]:
    async with get_session().create_client("sqs", config=AioConfig(max_pool_connections=connections)) as opened:
        yield opened


def url(name: str) -> str:
    """What the worker calls the queue."""
    return f"awssqs:///{name}?region={REGION}"


@asynccontextmanager
async def places(lease: int = 30, *, fifo: bool = False) -> AsyncIterator[tuple[str, str]]:
    """Two fresh queues, for requests and for responses; `lease` seconds as SQS has it by default.

    With `fifo` the responses' is a FIFO queue.
    """
    names = [f"{kind}-{uuid4().hex[:12]}" for kind in ("requests", "responses")]
    kinds: list[dict[str, str]] = [{}, {}]
    if fifo:
        names[1], kinds[1] = f"{names[1]}.fifo", {"FifoQueue": "true"}
    async with client() as sqs:
        lasts = {"VisibilityTimeout": str(lease)}
        urls = [
            (await sqs.create_queue(QueueName=name, Attributes=lasts | kind))["QueueUrl"]
            for name, kind in zip(names, kinds, strict=True)
        ]
        try:
            yield names[0], names[1]
        finally:
            for queue in urls:
                await sqs.delete_queue(QueueUrl=queue)


async def fill(name: str, bodies: Sequence[bytes]) -> None:
    """Send the backlog."""
    async with client() as sqs:
        queue = (await sqs.get_queue_url(QueueName=name))["QueueUrl"]
        for start in range(0, len(bodies), BATCH):
            batch = bodies[start : start + BATCH]
            entries = [{"Id": str(n), "MessageBody": body.decode()} for n, body in enumerate(batch)]
            result = await sqs.send_message_batch(QueueUrl=queue, Entries=entries)
            if result.get("Failed"):
                raise SystemExit(f"the backlog was refused: {result['Failed'][0]}")


async def take(name: str, found: list[float]) -> None:
    """Take the responses that there are; add the times at which the broker took them, in seconds."""
    async with client() as sqs:
        queue = (await sqs.get_queue_url(QueueName=name))["QueueUrl"]

        async def counter() -> None:
            while True:
                got = await sqs.receive_message(
                    QueueUrl=queue, MaxNumberOfMessages=BATCH, MessageSystemAttributeNames=["SentTimestamp"]
                )
                messages = got.get("Messages", [])
                if not messages:
                    return
                found.extend(int(message["Attributes"]["SentTimestamp"]) / 1000 for message in messages)
                entries = [{"Id": str(n), "ReceiptHandle": m["ReceiptHandle"]} for n, m in enumerate(messages)]
                await sqs.delete_message_batch(QueueUrl=queue, Entries=entries)

        await asyncio.gather(*(counter() for _ in range(COUNTERS)))


async def bare_loop(requests: str, responses: str, messages: int, receivers: int, *, attributes: bool) -> None:
    """Receive, send the body as it is, delete; `receivers` of these at once.

    With `attributes`, those that the contract puts on every response are sent, and all that it reads are asked for.
    """
    done = 0
    asked: Any = {"MessageAttributeNames": ["All"], "MessageSystemAttributeNames": SYSTEM_ATTRIBUTES}
    async with client(receivers) as sqs:
        source = (await sqs.get_queue_url(QueueName=requests))["QueueUrl"]
        sink = (await sqs.get_queue_url(QueueName=responses))["QueueUrl"]

        async def loop() -> None:
            nonlocal done
            while done < messages:
                got = await sqs.receive_message(
                    QueueUrl=source, MaxNumberOfMessages=BATCH, WaitTimeSeconds=1, **(asked if attributes else {})
                )
                batch = got.get("Messages", [])
                if not batch:
                    continue
                bodies = [
                    {"Id": str(n), "MessageBody": message["Body"], **(own(message) if attributes else {})}
                    for n, message in enumerate(batch)
                ]
                await sqs.send_message_batch(QueueUrl=sink, Entries=bodies)
                handles = [{"Id": str(n), "ReceiptHandle": m["ReceiptHandle"]} for n, m in enumerate(batch)]
                await sqs.delete_message_batch(QueueUrl=source, Entries=handles)
                done += len(batch)

        await asyncio.gather(*(loop() for _ in range(receivers)))


def own(message: Any) -> dict[str, Any]:
    """What the contract puts beside the response to `message`."""
    values = {
        "request_message_id": message["MessageId"],
        "response_id": RESPONSE_ID,
        "attempt": message["Attributes"]["ApproximateReceiveCount"],
    }
    return {"MessageAttributes": {name: {"DataType": "String", "StringValue": value} for name, value in values.items()}}


if __name__ == "__main__":
    _, source_name, sink_name, count, width, kind = sys.argv[1:]
    asyncio.run(bare_loop(source_name, sink_name, int(count), int(width), attributes=kind == "attributes"))
