"""Queues and topics of LocalStack (or whoever AWS_ENDPOINT_URL names), for tests."""

import json
import uuid
from contextlib import AsyncExitStack, asynccontextmanager

from aiobotocore.session import get_session


@asynccontextmanager
async def sqs():
    async with get_session().create_client("sqs") as client:
        yield client


@asynccontextmanager
async def sns():
    async with get_session().create_client("sns") as client:
        yield client


def name_of(arn: str) -> str:
    return arn.rpartition(":")[2]


async def make_queue(*, fifo: bool = False, max_attempts: int | None = None, **attributes) -> tuple[str, str | None]:
    """Make a queue, and where there is a `max_attempts` its dead-letter queue. Gives both ARNs."""
    name, suffix = f"t-{uuid.uuid4().hex}", ".fifo" if fifo else ""
    settings = {key: str(value) for key, value in attributes.items()} | ({"FifoQueue": "true"} if fifo else {})
    async with sqs() as client:

        async def one(name: str, settings: dict[str, str]) -> str:
            url = (await client.create_queue(QueueName=name, Attributes=settings))["QueueUrl"]
            return (await client.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"]))["Attributes"][
                "QueueArn"
            ]

        dead = None
        if max_attempts is not None:
            dead = await one(f"{name}-dead{suffix}", settings)
            policy = {"deadLetterTargetArn": dead, "maxReceiveCount": max_attempts}
            settings = settings | {"RedrivePolicy": json.dumps(policy)}
        return await one(name + suffix, settings), dead


async def make_topic(queue_arn: str, *, raw: bool = False) -> str:
    """Make a topic of the queue's kind, with the queue subscribed to it. Gives its ARN."""
    fifo = queue_arn.endswith(".fifo")
    async with sns() as client:
        answer = await client.create_topic(
            Name=f"t-{uuid.uuid4().hex}" + (".fifo" if fifo else ""), Attributes={"FifoTopic": "true"} if fifo else {}
        )
        attributes = {"RawMessageDelivery": "true"} if raw else {}
        await client.subscribe(TopicArn=answer["TopicArn"], Protocol="sqs", Endpoint=queue_arn, Attributes=attributes)
        return answer["TopicArn"]


class Raw:
    """One queue as the vendor's client sees it: what other programs send to it, and what arrives there."""

    def __init__(self, arn: str) -> None:
        self._arn = arn
        self._stack = AsyncExitStack()

    async def __aenter__(self):
        self._client = await self._stack.enter_async_context(sqs())
        self._url = (await self._client.get_queue_url(QueueName=name_of(self._arn)))["QueueUrl"]
        return self

    async def __aexit__(self, *_exc):
        await self._stack.aclose()

    async def send(self, body: str, attributes=None, **fields) -> str:
        """Send `body` as it is, `attributes` as strings or as the vendor's values; gives the message's id."""
        values = {
            name: {"DataType": "String", "StringValue": value} if isinstance(value, str) else value
            for name, value in (attributes or {}).items()
        }
        answer = await self._client.send_message(
            QueueUrl=self._url, MessageBody=body, MessageAttributes=values, **fields
        )
        return answer["MessageId"]

    async def receive(self) -> dict:
        """Take the next message, as it is on the wire."""
        answer = await self._client.receive_message(
            QueueUrl=self._url, WaitTimeSeconds=10, MessageAttributeNames=["All"], MessageSystemAttributeNames=["All"]
        )
        (message,) = answer["Messages"]
        return message
