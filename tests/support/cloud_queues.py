"""Queues that nobody has used on SQS, SNS and Pub/Sub, made with the vendors' own clients."""

import contextlib
import json
import os
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
from aiobotocore.session import get_session
from google.pubsub_v1 import DeadLetterPolicy, PublisherAsyncClient, SubscriberAsyncClient, Subscription
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport
from pairs import End

RAW = {"RawMessageDelivery": "true"}


def fresh() -> str:
    return f"e2e-{uuid.uuid4().hex}"


def queue_url(name: str) -> str:
    return f"awssqs:///{name}?region={os.environ['AWS_DEFAULT_REGION']}"


async def sqs(lease: float, max_attempts: int | None = None, *, fifo: bool = False) -> End:
    """A queue; with `max_attempts` one that has a dead-letter queue beside it."""
    async with get_session().create_client("sqs") as client:
        name, _ = await _create_queue(client, lease, max_attempts, ".fifo" if fifo else "")
    return End(queue_url(name), queue_url(name))


async def sqs_fifo(lease: float, max_attempts: int | None = None) -> End:
    """A FIFO queue."""
    return await sqs(lease, max_attempts, fifo=True)


async def sns(lease: float, max_attempts: int | None = None) -> End:
    """A topic and a queue that is subscribed to it, raw: what is published arrives as it was."""
    async with get_session().create_client("sqs") as client, get_session().create_client("sns") as topics:
        name, arn = await _create_queue(client, lease, max_attempts, "")
        topic = (await topics.create_topic(Name=name))["TopicArn"]
        await topics.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn, Attributes=RAW)
    return End(f"awssns:///{topic}?region={os.environ['AWS_DEFAULT_REGION']}", queue_url(name))


async def _create_queue(client: Any, lease: float, max_attempts: int | None, suffix: str) -> tuple[str, str]:
    attributes = {"VisibilityTimeout": f"{lease:.0f}"} | ({"FifoQueue": "true"} if suffix.endswith(".fifo") else {})
    if max_attempts is not None:
        _, dead = await _create_queue(client, lease, None, f"-dead{suffix}")
        policy = {"deadLetterTargetArn": dead, "maxReceiveCount": max_attempts}
        attributes["RedrivePolicy"] = json.dumps(policy)
    name = fresh() + suffix
    url = (await client.create_queue(QueueName=name, Attributes=attributes))["QueueUrl"]
    answer = await client.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
    return name, answer["Attributes"]["QueueArn"]


async def pubsub(lease: float, max_attempts: int | None = None, *, ordered: bool = False) -> End:
    """A topic with one subscription; with `max_attempts` one that has a dead-letter topic."""
    async with pubsub_clients() as (publisher, subscriber):
        topic = await _create_topic(publisher)
        policy = None
        if max_attempts is not None:
            dead = await _create_topic(publisher)
            policy = DeadLetterPolicy(dead_letter_topic=dead, max_delivery_attempts=max_attempts)
        subscription = topic.replace("/topics/", "/subscriptions/")
        await subscriber.create_subscription(
            request=Subscription(
                name=subscription,
                topic=topic,
                ack_deadline_seconds=int(lease),
                enable_message_ordering=ordered,
                dead_letter_policy=policy,
            )
        )
    return End(f"gcppubsub://{topic}", f"gcppubsub://{subscription}")


async def pubsub_ordered(lease: float, max_attempts: int | None = None) -> End:
    """As `pubsub`, with ordering keys kept."""
    return await pubsub(lease, max_attempts, ordered=True)


async def _create_topic(publisher: PublisherAsyncClient) -> str:
    topic = f"projects/{os.environ['PUBSUB_PROJECT_ID']}/topics/{fresh()}"
    await publisher.create_topic(name=topic)
    return topic


@contextlib.asynccontextmanager
async def pubsub_clients() -> AsyncIterator[tuple[PublisherAsyncClient, SubscriberAsyncClient]]:
    """Both clients of the emulator, on one channel."""
    async with grpc.aio.insecure_channel(os.environ["PUBSUB_EMULATOR_HOST"]) as channel:
        yield (
            PublisherAsyncClient(transport=PublisherGrpcAsyncIOTransport(channel=channel)),
            SubscriberAsyncClient(transport=SubscriberGrpcAsyncIOTransport(channel=channel)),
        )
