"""Google Pub/Sub: `gcppubsub://projects/P/subscriptions/S` and `gcppubsub://projects/P/topics/T`.

    gcppubsub://projects/P/subscriptions/S?endpoint=us-central1-pubsub.googleapis.com:443

`endpoint` names a regional endpoint, which ordering keys and exactly-once delivery want. Credentials are Application
Default Credentials; with PUBSUB_EMULATOR_HOST set, the emulator there is spoken to, without any.

A worker needs `roles/pubsub.subscriber` and `roles/pubsub.viewer` on its subscription, and `roles/pubsub.publisher` on
its topic.
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rejoinder.adapters.errors import BadURL
from rejoinder.adapters.pubsub_subscription import PubSubSubscription
from rejoinder.adapters.pubsub_topic import PubSubTopic
from rejoinder.adapters.pubsub_wire import connect
from rejoinder.adapters.urls import split

OPTIONS = {"endpoint": "HOST:PORT of a regional endpoint"}
NAME = re.compile(r"projects/([^/]+)/(subscriptions|topics)/([^/]+)")
ENDPOINT = re.compile(r"[A-Za-z0-9.-]+:[0-9]+")
KINDS = {"subscriptions": "a subscription, to receive from", "topics": "a topic, to send to"}


def parse(url: str, kind: str) -> tuple[str, str | None]:
    """Read the resource's name, such as `projects/P/topics/T`, and the endpoint."""
    parts, query = split(url, OPTIONS)
    resource = parts.netloc + parts.path
    match = NAME.fullmatch(resource)
    if match is None or match[2] != kind:
        raise BadURL(f"{url!r} must name {KINDS[kind]}: gcppubsub://projects/PROJECT/{kind}/NAME")
    endpoint = query.get("endpoint")
    if endpoint is not None and not ENDPOINT.fullmatch(endpoint):
        raise BadURL(f"parameter 'endpoint' must be HOST:PORT in {url!r}, not {endpoint!r}")
    return resource, endpoint


@asynccontextmanager
async def open_subscription(url: str) -> AsyncIterator[PubSubSubscription]:
    """Open the subscription that `url` names. Raises BadURL, NotFound, Denied, Transient."""
    resource, endpoint = parse(url, "subscriptions")
    connection = await connect(endpoint)
    try:
        subscription = PubSubSubscription(connection, resource)
        await subscription.read()
        try:
            yield subscription
        finally:
            await subscription.close()
    finally:
        await connection.close()


@asynccontextmanager
async def open_topic(url: str) -> AsyncIterator[PubSubTopic]:
    """Open the topic that `url` names. Raises BadURL, NotFound, Denied, Transient."""
    resource, endpoint = parse(url, "topics")
    connection = await connect(endpoint)
    try:
        topic = PubSubTopic(connection, resource)
        await topic.read()
        yield topic
    finally:
        await connection.close()
