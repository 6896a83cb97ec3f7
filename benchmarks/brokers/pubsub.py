"""Pub/Sub as the benchmark sees it: topics, backlogs, the responses' clock, the bare loop, the callback client."""

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import grpc
from google.api_core.exceptions import DeadlineExceeded
from google.cloud.pubsub_v1 import PublisherClient, SubscriberClient
from google.cloud.pubsub_v1.types import BatchSettings, FlowControl
from google.pubsub_v1 import PublisherAsyncClient, SubscriberAsyncClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport

BATCH = 100
RESPONSE_ID = 32 * "a"
COUNT_BATCH = 1000
FILL_BATCH = 500
LARGEST = 20 * 1024 * 1024


@asynccontextmanager
async def clients() -> AsyncIterator[tuple[PublisherAsyncClient, SubscriberAsyncClient]]:
    """The two clients, over a channel each: neither's calls wait behind the other's."""
    options = [("grpc.max_receive_message_length", LARGEST), ("grpc.use_local_subchannel_pool", 1)]
    host = os.environ["PUBSUB_EMULATOR_HOST"]
    async with (
        grpc.aio.insecure_channel(host, options=options) as sending,
        grpc.aio.insecure_channel(host, options=options) as receiving,
    ):
        yield (
            PublisherAsyncClient(transport=PublisherGrpcAsyncIOTransport(channel=sending)),
            SubscriberAsyncClient(transport=SubscriberGrpcAsyncIOTransport(channel=receiving)),
        )


def topic(name: str) -> str:
    return f"projects/{os.environ['PUBSUB_PROJECT_ID']}/topics/{name}"


def subscription(name: str) -> str:
    return f"projects/{os.environ['PUBSUB_PROJECT_ID']}/subscriptions/{name}"


def url(name: str) -> str:
    """What the worker calls the subscription or the topic, by the name's first letters."""
    return f"gcppubsub://{subscription(name) if name.startswith('requests') else topic(name)}"


@asynccontextmanager
async def places(lease: int = 60) -> AsyncIterator[tuple[str, str]]:
    """Two fresh topics, for requests and for responses, each with a subscription of its name."""
    names = [f"{kind}-{uuid4().hex[:12]}" for kind in ("requests", "responses")]
    async with clients() as (publisher, subscriber):
        for name in names:
            await publisher.create_topic(name=topic(name))
            request = {"name": subscription(name), "topic": topic(name), "ack_deadline_seconds": lease}
            await subscriber.create_subscription(request=request)
        try:
            yield names[0], names[1]
        finally:
            for name in names:
                await subscriber.delete_subscription(subscription=subscription(name))
                await publisher.delete_topic(topic=topic(name))


async def fill(name: str, bodies: Sequence[bytes]) -> None:
    """Publish the backlog."""
    async with clients() as (publisher, _):
        for start in range(0, len(bodies), FILL_BATCH):
            batch: list[Any] = [{"data": body} for body in bodies[start : start + FILL_BATCH]]
            await publisher.publish(topic=topic(name), messages=batch)


async def take(name: str, found: list[float]) -> None:
    """Take the responses that there are; add the times at which the broker took them, in seconds."""
    async with clients() as (_, subscriber):
        while True:
            try:
                pulled = await subscriber.pull(
                    subscription=subscription(name), max_messages=COUNT_BATCH, timeout=2, retry=None
                )
            except DeadlineExceeded:
                return
            received = pulled.received_messages
            if not received:
                return
            found.extend(one.message.publish_time.timestamp() for one in received)
            await subscriber.acknowledge(subscription=subscription(name), ack_ids=[one.ack_id for one in received])


async def bare_loop(requests: str, responses: str, messages: int, receivers: int, *, attributes: bool) -> None:
    """Pull, publish the data as it is, acknowledge; `receivers` of these at once.

    With `attributes`, those that the contract puts on every response are published.
    """
    done = 0
    source, sink = subscription(requests), topic(responses)
    async with clients() as (publisher, subscriber):

        async def loop() -> None:
            nonlocal done
            while done < messages:
                try:
                    pulled = await subscriber.pull(subscription=source, max_messages=BATCH, timeout=2, retry=None)
                except DeadlineExceeded:
                    continue
                received = pulled.received_messages
                if not received:
                    continue
                batch: list[Any] = [
                    {"data": one.message.data, **(own(one.message) if attributes else {})} for one in received
                ]
                await publisher.publish(topic=sink, messages=batch)
                await subscriber.acknowledge(subscription=source, ack_ids=[one.ack_id for one in received])
                done += len(received)

        await asyncio.gather(*(loop() for _ in range(receivers)))


def own(message: Any) -> dict[str, Any]:
    """What the contract puts beside the response to `message`, of which the service counts no attempts here."""
    return {"attributes": {"request_message_id": message.message_id, "response_id": RESPONSE_ID}}


def callback_client(requests: str, responses: str) -> None:
    """Google's streaming client: the callback publishes, and the message is acked when that is through."""
    # A batch is sent when it is full or 10 ms old, as by default; ten times as large as the default.
    publisher = PublisherClient(batch_settings=BatchSettings(max_messages=1000, max_latency=0.01))
    sink = publisher.topic_path(os.environ["PUBSUB_PROJECT_ID"], responses)

    def callback(message: Any) -> None:
        publisher.publish(sink, message.data).add_done_callback(lambda published: _acked(message, published))

    with SubscriberClient() as subscriber:
        subscriber.subscribe(subscription(requests), callback, flow_control=FlowControl(max_messages=1000))
        threading.Event().wait()  # until the benchmark ends it


def _acked(message: Any, published: Any) -> None:
    if published.exception() is None:
        message.ack()
    else:
        message.nack()


if __name__ == "__main__":
    side, source_name, sink_name, *options = sys.argv[1:]
    if side == "callback":
        callback_client(source_name, sink_name)
    else:
        count, width, kind = options
        asyncio.run(bare_loop(source_name, sink_name, int(count), int(width), attributes=kind == "attributes"))
