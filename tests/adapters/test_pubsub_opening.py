"""URLs, credentials, and what opening finds out."""

import grpc
import pubsub_resources
import pytest
from pubsub_service import SUBSCRIPTION, TOPIC, Refusal

from rejoinder.adapters import (
    Backlog,
    BadURL,
    Denied,
    NotFound,
    Outgoing,
    Transient,
    open_subscription,
    open_topic,
    pubsub_wire,
)


@pytest.mark.parametrize(
    ("url", "opener", "wanted"),
    [
        ("gcppubsub://projects/p/topics/t", open_subscription, "/subscriptions/"),
        ("gcppubsub://projects/p/subscriptions/s", open_topic, "/topics/"),
        ("gcppubsub://projects/p/topics/", open_topic, "/topics/"),
        ("gcppubsub://projects/p/topics/a/b", open_topic, "/topics/"),
        ("gcppubsub://t", open_topic, "/topics/"),
        ("gcppubsub://projects/p/topics/t?region=r", open_topic, "endpoint"),
        ("gcppubsub://projects/p/topics/t?endpoint=http://h:1", open_topic, "HOST:PORT"),
        ("gcppubsub://projects/p/topics/t?endpoint=h", open_topic, "HOST:PORT"),
    ],
)
async def test_a_wrong_url_says_what_is_wanted(url, opener, wanted):
    with pytest.raises(BadURL, match=wanted):
        async with opener(url):
            pass


async def test_no_credentials(monkeypatch, tmp_path):
    monkeypatch.delenv("PUBSUB_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    for opener, resource in ((open_subscription, SUBSCRIPTION), (open_topic, TOPIC)):
        with pytest.raises(Denied, match=r"none\.json") as caught:
            async with opener(f"gcppubsub://{resource}"):
                pass
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("retryable", "expected"), [(True, Transient), (False, Denied)])
def test_credentials_that_are_refused(retryable, expected):
    from google.auth.exceptions import RefreshError

    assert type(pubsub_wire.auth_error(RefreshError("invalid_grant", retryable=retryable))) is expected


async def test_a_subscription_that_is_not_there(gcp):
    with pytest.raises(NotFound, match="projects/local/subscriptions/none"):
        async with open_subscription("gcppubsub://projects/local/subscriptions/none"):
            pass


async def test_a_topic_that_is_not_there(gcp):
    with pytest.raises(NotFound, match="projects/local/topics/none"):
        async with open_topic("gcppubsub://projects/local/topics/none"):
            pass


async def test_what_the_subscription_is_like_is_read(gcp):
    name, _, dead = await pubsub_resources.make(17, 6, enable_message_ordering=True, enable_exactly_once_delivery=True)
    async with open_subscription(f"gcppubsub://{name}") as subscription:
        assert subscription.name == f"gcppubsub://{name}"
        assert subscription.lease_seconds == 17
        assert subscription.max_attempts == 6
        assert subscription.keeps_order
        assert subscription.exactly_once
    async with open_subscription(f"gcppubsub://{dead}") as subscription:
        assert subscription.max_attempts is None
        assert not subscription.keeps_order
        assert not subscription.exactly_once


async def test_a_push_subscription_is_refused(gcp):
    name, _, _ = await pubsub_resources.make(push_config={"push_endpoint": "https://example.com/push"})
    with pytest.raises(BadURL, match=r"push_config.*type pull"):
        async with open_subscription(f"gcppubsub://{name}"):
            pass


@pytest.mark.parametrize("spoil", ["detached", "topic"])
async def test_a_detached_subscription_is_refused(google, spoil):
    if spoil == "detached":
        google.info.detached = True
    else:
        google.info.topic = "_deleted-topic_"
    with pytest.raises(NotFound, match="detached"):
        async with open_subscription(f"gcppubsub://{SUBSCRIPTION}"):
            pass


def refuse(code, details="User not authorized to perform this action."):
    async def hook(_request):
        raise Refusal(code, details)

    return hook


async def test_denied_names_the_permission_to_grant(google):
    google.hooks["GetSubscription"] = refuse(grpc.StatusCode.PERMISSION_DENIED)
    with pytest.raises(Denied, match=r"grant .*pubsub\.subscriptions\.get") as caught:
        async with open_subscription(f"gcppubsub://{SUBSCRIPTION}"):
            pass
    assert "\n" not in str(caught.value)
    del google.hooks["GetSubscription"]
    google.hooks["Pull"] = refuse(grpc.StatusCode.PERMISSION_DENIED)
    async with open_subscription(f"gcppubsub://{SUBSCRIPTION}") as subscription:
        with pytest.raises(Denied, match=r"pubsub\.subscriptions\.consume"):
            await subscription.receive(1, 5)


async def test_a_sender_that_may_not_read_its_topic_can_send(google):
    google.hooks["GetTopic"] = refuse(grpc.StatusCode.PERMISSION_DENIED)
    async with open_topic(f"gcppubsub://{TOPIC}") as topic:
        (sent,) = await topic.publish([Outgoing(b"x")])
        assert isinstance(sent, str)
        google.hooks["Publish"] = refuse(grpc.StatusCode.PERMISSION_DENIED)
        (denied,) = await topic.publish([Outgoing(b"x")])
        assert isinstance(denied, Denied)
        assert "pubsub.topics.publish" in str(denied)


async def test_credentials_that_the_service_never_took_are_denied(google):
    google.hooks["GetSubscription"] = google.hooks["GetTopic"] = refuse(grpc.StatusCode.UNAUTHENTICATED, "who?")
    for opener, resource in ((open_subscription, SUBSCRIPTION), (open_topic, TOPIC)):
        with pytest.raises(Denied, match=r"who\?"):
            async with opener(f"gcppubsub://{resource}"):
                pass


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, Transient),
        (grpc.StatusCode.INTERNAL, Transient),
        (grpc.StatusCode.ABORTED, Transient),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Transient),
        (grpc.StatusCode.UNKNOWN, Transient),
        (grpc.StatusCode.CANCELLED, Transient),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Transient),
        (grpc.StatusCode.UNAUTHENTICATED, Transient),  # they were good: a new token is late
        (grpc.StatusCode.NOT_FOUND, NotFound),
        (grpc.StatusCode.FAILED_PRECONDITION, Denied),
    ],
)
async def test_what_each_status_means(google, code, expected):
    async with open_subscription(f"gcppubsub://{SUBSCRIPTION}") as subscription:
        assert await subscription.backlog() == Backlog(None, None, None)
        google.hooks["GetSubscription"] = refuse(code, "because")
        with pytest.raises(expected, match="because"):
            await subscription.backlog()


async def test_calls_are_routed_as_the_service_wants(google):
    async with open_subscription(f"gcppubsub://{SUBSCRIPTION}") as one, open_topic(f"gcppubsub://{TOPIC}") as topic:
        await topic.publish([Outgoing(b"x")])
        await one.receive(1, 0)
    for name, metadata in google.metadata:
        field = {"GetTopic": "topic", "Publish": "topic"}.get(name, "subscription")
        assert metadata["x-goog-request-params"] == f"{field}={TOPIC if field == 'topic' else SUBSCRIPTION}"
