"""Topics and subscriptions of the Pub/Sub emulator (or whoever PUBSUB_EMULATOR_HOST names), for tests."""

import os
import uuid

import grpc.aio
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport
from google.pubsub_v1.types import DeadLetterPolicy, Subscription, Topic

PROJECT = "local"


async def make(lease: float = 10, max_attempts: int | None = None, **settings) -> tuple[str, str, str | None]:
    """Make a topic and its subscription, and where there is a `max_attempts` a dead-letter topic and its subscription.

    Gives the names of the subscription, the topic and the subscription of dead letters. `settings` are further fields
    of the subscription.
    """
    name = f"t-{uuid.uuid4().hex}"
    async with grpc.aio.insecure_channel(os.environ["PUBSUB_EMULATOR_HOST"]) as channel:
        topics = PublisherGrpcAsyncIOTransport(channel=channel)
        subscriptions = SubscriberGrpcAsyncIOTransport(channel=channel)

        async def one(name: str, **more) -> tuple[str, str]:
            topic, subscription = f"projects/{PROJECT}/topics/{name}", f"projects/{PROJECT}/subscriptions/{name}"
            await topics.create_topic(Topic(name=topic))
            await subscriptions.create_subscription(
                Subscription(name=subscription, topic=topic, ack_deadline_seconds=round(lease), **more)
            )
            return topic, subscription

        dead = None
        if max_attempts is not None:
            dead_topic, dead = await one(f"{name}-dead")
            settings["dead_letter_policy"] = DeadLetterPolicy(
                dead_letter_topic=dead_topic, max_delivery_attempts=max_attempts
            )
        topic, subscription = await one(name, **settings)
        return subscription, topic, dead
