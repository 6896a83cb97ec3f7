"""What is found out about Pub/Sub subscriptions and topics."""

import os

import grpc.aio
import pubsub_resources
import pytest
from denying import denying_gcp
from findings import by_check, states
from google.protobuf.duration_pb2 import Duration
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
from google.pubsub_v1.types import DeleteTopicRequest, ExpirationPolicy, RetryPolicy, Topic, pubsub

from rejoinder.adapters import BadURL, check_subscription, check_topic
from rejoinder.adapters.pubsub_policies import subscription_policies, topic_policies, undeliverable

GRANTED = {"pubsub.subscriptions.consume", "pubsub.topics.publish"}
NAME = "projects/p/subscriptions/s"


@pytest.fixture(autouse=True)
def _gcp(gcp):
    """The emulator is up."""


async def test_a_good_subscription_and_its_topic():
    retry = RetryPolicy(minimum_backoff=Duration(seconds=1), maximum_backoff=Duration(seconds=60))
    subscription, topic, _ = await pubsub_resources.make(60, 5, retry_policy=retry)
    checkup = await check_subscription(f"gcppubsub://{subscription}")
    found = by_check(checkup)
    assert states(found, "fail") == set()
    assert states(found, "unknown") == {"permissions", "dead-letter permissions", "messages"}
    assert found["permissions"].fact == "not here: the emulator has no IAM"
    assert (checkup.max_attempts, checkup.ends) == (5, {topic})
    checkup = await check_topic(f"gcppubsub://{topic}")
    assert states(by_check(checkup), "ok") == {"reachable", "subscriptions", "size limit"}
    assert checkup.ends == {topic}


async def test_what_to_do():
    subscription, _, _ = await pubsub_resources.make(10)
    found = by_check(await check_subscription(f"gcppubsub://{subscription}"))
    assert states(found, "advice") == {"lease", "dead-letter policy", "retry policy", "expiration"}
    assert found["lease"].todo.endswith("--project=local --ack-deadline=60")


async def test_permissions(gcp, monkeypatch):
    subscription, topic, _ = await pubsub_resources.make(60)
    async with denying_gcp(gcp, granted=GRANTED) as address:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", address)
        found = by_check(await check_subscription(f"gcppubsub://{subscription}"))
        assert found["permission to receive, renew and acknowledge"].state == "ok"
        assert by_check(await check_topic(f"gcppubsub://{topic}"))["permission to publish"].state == "ok"
    async with denying_gcp(gcp, "GetTopic", "ListTopicSubscriptions", granted=set()) as address:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", address)
        found = by_check(await check_subscription(f"gcppubsub://{subscription}"))
        assert states(found, "fail") == {"permission to receive, renew and acknowledge"}
        assert "--role=roles/pubsub.subscriber" in found["permission to receive, renew and acknowledge"].todo
        found = by_check(await check_topic(f"gcppubsub://{topic}"))
        assert states(found, "fail") == {"permission to publish"}
        assert states(found, "unknown") == {"reachable", "subscriptions"}
        assert "--role=roles/pubsub.publisher" in found["permission to publish"].todo
    async with denying_gcp(gcp, "GetSubscription", granted=GRANTED) as address:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", address)
        found = by_check(await check_subscription(f"gcppubsub://{subscription}"))
        assert "pubsub.subscriptions.get" in found["reachable"].fact


async def test_what_is_published_to_a_topic_without_subscription_is_lost():
    subscription, _, dead = await pubsub_resources.make(60, 5)
    lonely = f"{dead.replace('subscriptions', 'topics')}-lonely"
    async with grpc.aio.insecure_channel(os.environ["PUBSUB_EMULATOR_HOST"]) as channel:
        topics = PublisherGrpcAsyncIOTransport(channel=channel)
        await topics.create_topic(Topic(name=lonely))
        found = by_check(await check_topic(f"gcppubsub://{lonely}"))
        assert states(found, "fail") == {"subscriptions"}
        assert "gcloud pubsub subscriptions create" in found["subscriptions"].todo
        await topics.delete_topic(DeleteTopicRequest(topic=dead.replace("subscriptions", "topics")))
        found = by_check(await check_subscription(f"gcppubsub://{subscription}"))
        assert states(found, "fail") == {"dead-letter topic"}


async def test_what_is_not_there():
    found = by_check(await check_subscription("gcppubsub://projects/local/subscriptions/none"))
    assert "gcloud pubsub subscriptions create none --project=local" in found["reachable"].todo
    found = by_check(await check_topic("gcppubsub://projects/local/topics/none"))
    assert "gcloud pubsub topics create none --project=local" in found["reachable"].todo
    with pytest.raises(BadURL):
        await check_topic("gcppubsub://projects/local/subscriptions/none")


def test_settings_that_the_emulator_does_not_have():
    info = pubsub.Subscription(ack_deadline_seconds=60, expiration_policy=ExpirationPolicy(), filter="attributes:a")
    found = {finding.check: finding for finding in subscription_policies(pubsub.Subscription.pb(info), NAME)}
    assert (found["expiration"].state, found["filter"].state) == ("ok", "advice")
    info = pubsub.Subscription(ack_deadline_seconds=60, message_retention_duration=Duration(seconds=600))
    found = {finding.check: finding for finding in subscription_policies(pubsub.Subscription.pb(info), NAME)}
    assert "deleted" in found["retention"].fact
    assert (found["retention"].state, found["expiration"].state) == ("advice", "advice")
    topic = pubsub.Topic(schema_settings={"schema": "projects/p/schemas/x"}, kms_key_name="k")
    found = {finding.check: finding for finding in topic_policies(pubsub.Topic.pb(topic))}
    assert (found["schema"].state, found["encryption"].state) == ("advice", "ok")


@pytest.mark.parametrize(
    "fields",
    [
        {"topic": "_deleted-topic_"},
        {"detached": True},
        {"push_config": {"push_endpoint": "https://example.com"}},
        {"bigquery_config": {"table": "t"}},
        {"cloud_storage_config": {"bucket": "b"}},
    ],
)
def test_subscriptions_that_cannot_be_pulled(fields):
    finding = undeliverable(pubsub.Subscription.pb(pubsub.Subscription(**fields)), NAME)
    assert finding is not None
    assert finding.state == "fail"
    assert undeliverable(pubsub.Subscription.pb(pubsub.Subscription(topic="projects/p/topics/t")), NAME) is None
