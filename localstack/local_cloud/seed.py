"""Creates in the local cloud what the examples use. Done again, it changes nothing."""

import contextlib
import json
from typing import Any

import grpc
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from google.api_core.exceptions import AlreadyExists
from google.protobuf.duration_pb2 import Duration
from google.pubsub_v1 import (
    DeadLetterPolicy,
    ExpirationPolicy,
    PublisherClient,
    RetryPolicy,
    SubscriberClient,
    Subscription,
)
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

from local_cloud import resources


async def seed_aws(endpoint: str) -> None:
    """Create the queues, dead-letter queues, topics, subscriptions and buckets.

    Endpoint and credentials are given here and not taken from the environment: no real account is ever written to.
    """
    session = get_session()
    given: dict[str, Any] = {
        "endpoint_url": endpoint,
        "region_name": resources.REGION,
        "aws_access_key_id": "test",
        "aws_secret_access_key": "test",
        "config": AioConfig(s3={"addressing_style": "path"}),
    }
    async with (
        session.create_client("sqs", **given) as sqs,
        session.create_client("sns", **given) as sns,
        session.create_client("s3", **given) as s3,
    ):
        arns = {name: await _queue(sqs, name, dead) for name, dead in resources.QUEUES.items()}
        for topic, queue in resources.SNS_TOPICS.items():
            topic_arn = (await sns.create_topic(Name=topic))["TopicArn"]
            raw = {"RawMessageDelivery": "true"}
            await sns.subscribe(TopicArn=topic_arn, Protocol="sqs", Endpoint=arns[queue], Attributes=raw)
        for bucket in resources.BUCKETS:
            await s3.create_bucket(Bucket=bucket)


async def _queue(sqs: Any, name: str, dead: str | None) -> str:
    """Create a queue, or set the attributes of the one that is there; gives its ARN."""
    fifo = {"FifoQueue": "true"} if name.endswith(".fifo") else {}
    url = (await sqs.create_queue(QueueName=name, Attributes=fifo))["QueueUrl"]
    attributes = {"VisibilityTimeout": str(resources.LEASE_SECONDS)}
    if fifo:
        attributes |= {"DeduplicationScope": "messageGroup", "FifoThroughputLimit": "perMessageGroupId"}
    if name in resources.QUEUES.values():
        attributes["MessageRetentionPeriod"] = str(resources.DEAD_SECONDS)
    if dead:
        target = f"arn:aws:sqs:{resources.REGION}:{resources.ACCOUNT}:{dead}"
        attributes["RedrivePolicy"] = json.dumps(
            {"deadLetterTargetArn": target, "maxReceiveCount": resources.MAX_ATTEMPTS}
        )
    await sqs.set_queue_attributes(QueueUrl=url, Attributes=attributes)
    found = await sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
    return str(found["Attributes"]["QueueArn"])


def seed_pubsub(address: str) -> None:
    """Create the topics and their subscriptions, in the emulator at `address` (host:port)."""
    with grpc.insecure_channel(address) as channel:
        publisher = PublisherClient(transport=PublisherGrpcTransport(channel=channel))
        subscriber = SubscriberClient(transport=SubscriberGrpcTransport(channel=channel))
        for name, dead in resources.PUBSUB_TOPICS.items():
            with contextlib.suppress(AlreadyExists):
                publisher.create_topic(name=f"projects/{resources.PROJECT}/topics/{name}")
            with contextlib.suppress(AlreadyExists):
                subscriber.create_subscription(_subscription(name, dead))


def _subscription(name: str, dead: str | None) -> Subscription:
    least, most = resources.RETRY_SECONDS
    policy = None
    if dead:
        policy = DeadLetterPolicy(
            dead_letter_topic=f"projects/{resources.PROJECT}/topics/{dead}",
            max_delivery_attempts=resources.MAX_ATTEMPTS,
        )
    return Subscription(
        name=f"projects/{resources.PROJECT}/subscriptions/{name}",
        topic=f"projects/{resources.PROJECT}/topics/{name}",
        ack_deadline_seconds=resources.LEASE_SECONDS,
        retry_policy=RetryPolicy(minimum_backoff=Duration(seconds=least), maximum_backoff=Duration(seconds=most)),
        dead_letter_policy=policy,
        expiration_policy=ExpirationPolicy(),  # never
        enable_message_ordering=name.endswith(resources.ORDERED),
    )
