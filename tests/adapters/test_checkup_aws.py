"""What is found out about SQS queues and SNS topics, and that looking at them touches no message."""

import aws_resources
import pytest
from denying import denying_aws
from findings import by_check, states

from rejoinder.adapters import BadURL, check_subscription, check_topic

MONTH = 1_209_600


@pytest.fixture(autouse=True)
def _aws(aws):
    """LocalStack is up."""


def url_of(arn: str) -> str:
    return f"awssqs:///{aws_resources.name_of(arn)}"


async def test_a_good_queue_and_no_message_is_touched():
    arn, dead = await aws_resources.make_queue(max_attempts=5, VisibilityTimeout=60, MessageRetentionPeriod=MONTH)
    async with aws_resources.Raw(arn) as queue:
        await queue.send("x")
        receiving, sending = await check_subscription(url_of(arn)), await check_topic(url_of(arn))
        message = await queue.receive()
        assert (message["Body"], message["Attributes"]["ApproximateReceiveCount"]) == ("x", "1")
    found = by_check(receiving)
    assert states(found, "unknown") == {"permission to receive"}
    assert states(found, "advice") == states(found, "fail") == set()
    assert found["permission to renew"].state == found["permission to acknowledge"].state == "ok"
    assert found["messages"].fact == "about 1 waiting, 0 held, 0 delayed"
    assert found["lease"].fact.startswith("60 s")
    assert dead in found["dead-letter policy"].fact
    assert (receiving.max_attempts, receiving.max_body, receiving.ends) == (5, 1_048_576, {arn})
    found = by_check(sending)
    assert states(found, "ok") == set(found)
    assert found["permission to send"].fact == "sqs:SendMessage is allowed"
    assert sending.ends == {arn}


async def test_what_to_do():
    arn, dead = await aws_resources.make_queue(
        max_attempts=2, VisibilityTimeout=5, MessageRetentionPeriod=3600, DelaySeconds=3, MaximumMessageSize=2048
    )
    async with aws_resources.Raw(dead) as queue:
        await queue.send("x")
    found = by_check(await check_subscription(url_of(arn))) | by_check(await check_topic(url_of(arn)))
    assert states(found, "advice") == {
        *("lease", "dead-letter policy", "dead-letter retention", "dead letters", "retention", "delay", "size limit"),
    }
    assert found["lease"].todo.endswith("--attributes VisibilityTimeout=60")
    assert aws_resources.name_of(dead) in found["dead letters"].todo
    found = by_check(await check_subscription(f"{url_of(arn)}?lease=90"))
    assert found["lease"].state == "ok"


async def test_a_fifo_queue_is_probed_without_a_message():
    arn, _ = await aws_resources.make_queue(fifo=True, ContentBasedDeduplication="true")
    found = by_check(await check_topic(url_of(arn)))
    assert found["permission to send"].state == found["deduplication"].state == "ok"
    assert found["messages"].fact == "about 0 waiting, 0 held, 0 delayed"
    assert "perMessageGroupId" in found["throughput"].todo
    assert by_check(await check_subscription(url_of(arn)))["dead-letter policy"].state == "advice"


@pytest.mark.parametrize(
    ("operation", "check", "action"),
    [
        ("ReceiveMessage", "permission to receive", "sqs:ReceiveMessage"),
        ("DeleteMessageBatch", "permission to acknowledge", "sqs:DeleteMessage"),
        ("ChangeMessageVisibilityBatch", "permission to renew", "sqs:ChangeMessageVisibility"),
        ("SendMessageBatch", "permission to send", "sqs:SendMessage"),
        ("GetQueueAttributes", "permission to look (sqs:GetQueueAttributes)", "sqs:GetQueueAttributes"),
    ],
)
async def test_a_denied_permission_is_named(operation, check, action, aws, monkeypatch):
    arn, _ = await aws_resources.make_queue()
    async with denying_aws(aws, operation) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        ask = check_topic if operation == "SendMessageBatch" else check_subscription
        found = by_check(await ask(url_of(arn)))
    assert states(found, "fail") == {check}
    assert f"allow {action}" in found[check].todo


async def test_a_topic():
    arn, _ = await aws_resources.make_queue()
    topic = await aws_resources.make_topic(arn)
    checkup = await check_topic(f"awssns:///{topic}")
    found = by_check(checkup)
    assert states(found, "unknown") == {"permission to publish"}
    assert states(found, "advice") == states(found, "fail") == set()
    assert checkup.ends == {topic, arn}  # so that requests from this queue are seen to meet their answers
    assert by_check(await check_topic(url_of(arn)))["messages"].fact == "about 0 waiting, 0 held, 0 delayed"


async def test_a_topic_that_nobody_hears_loses_responses():
    async with aws_resources.sns() as client:
        topic = (await client.create_topic(Name="nobody-hears"))["TopicArn"]
    found = by_check(await check_topic(f"awssns:///{topic}"))
    assert states(found, "fail") == {"subscriptions"}
    assert f"aws sns subscribe --region us-east-1 --topic-arn {topic}" in found["subscriptions"].todo


async def test_denied_permissions_of_a_topic(aws, monkeypatch):
    topic = await aws_resources.make_topic((await aws_resources.make_queue())[0])
    async with denying_aws(aws, "Publish", "GetTopicAttributes", "ListSubscriptionsByTopic") as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        found = by_check(await check_topic(f"awssns:///{topic}"))
    assert (states(found, "fail"), states(found, "unknown")) == ({"permission to publish"}, {"reachable"})
    assert f"allow sns:Publish on {topic}" in found["permission to publish"].todo


async def test_what_is_not_there():
    found = by_check(await check_subscription("awssqs:///there-is-none"))
    assert "aws sqs create-queue --region us-east-1 --queue-name there-is-none" in found["reachable"].todo
    topic = "arn:aws:sns:us-east-1:000000000000:there-is-none"
    found = by_check(await check_topic(f"awssns:///{topic}"))
    assert "aws sns create-topic --region us-east-1 --name there-is-none" in found["reachable"].todo


async def test_nobody_receives_from_sns():
    with pytest.raises(BadURL, match="subscribe an SQS queue"):
        await check_subscription("awssns:///arn:aws:sns:us-east-1:000000000000:t")
