"""What can be found out about an SNS topic without publishing."""

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

from rejoinder.adapters import aws_errors
from rejoinder.adapters.aws import Connections, Vendor
from rejoinder.adapters.aws_checkup import ASKING, encryption, probe, reached, unreachable
from rejoinder.adapters.checkup import Checkup, Finding, ask, fail, ok, unknown
from rejoinder.adapters.errors import AdapterError, Denied
from rejoinder.adapters.sns import MAX_MESSAGE, open_subscription, parse

LOOK: Final = "sns:GetTopicAttributes"


async def check_subscription(url: str) -> Checkup:
    """Refuse, as `rejoinder.adapters.sns.open_subscription`: raises BadURL."""
    async with open_subscription(url):
        raise AssertionError


async def check_topic(url: str) -> Checkup:
    """See `rejoinder.adapters.urls.check_topic`."""
    arn, region = parse(url)
    async with AsyncExitStack() as stack:
        try:
            connections = await Vendor(url, region, stack).connect("sns", ASKING)
            listed = await _subscriptions(connections, arn)
            found, largest = await _settings(connections, listed, arn)
        except AdapterError as exc:
            fifo = " --attributes FifoTopic=true" if arn.endswith(".fifo") else ""
            create = f"aws sns create-topic --region {region} --name {arn.rpartition(':')[2]}{fifo}"
            return Checkup([unreachable(exc, "sns", LOOK, create)])
        # Without a text SNS takes no message, whatever else is wrong with it.
        found.append(
            await probe(
                connections,
                "permission to publish",
                "sns:Publish",
                arn,
                lambda sns: sns.publish(TopicArn=arn, Message="", Subject=""),
            )
        )
        ends = frozenset({arn, *(one.get("Endpoint", "") for one in listed if one.get("Protocol") == "sqs")})
        return Checkup([*found, ok("size limit", f"{largest} bytes")], ends, max_body=largest)


async def _settings(
    connections: Connections[Any], listed: Sequence[Mapping[str, str]], arn: str
) -> tuple[list[Finding], int]:
    """What the topic says of itself, and the size of its largest message. Raises AdapterError."""
    try:
        answer = await ask(connections.run(LOOK, arn, lambda sns: sns.get_topic_attributes(TopicArn=arn)))
    except Denied as exc:
        if not aws_errors.is_forbidden(exc):
            raise
        fact = "these credentials may not look at the topic"  # a role that may only publish is a good role
        return [unknown("reachable", fact, f"allow {LOOK} on {arn} to who runs doctor")], MAX_MESSAGE
    attributes: Mapping[str, str] = answer.get("Attributes", {})
    order = "by message group" if arn.endswith(".fifo") else "none (a standard topic)"
    found = [
        reached(arn, "sns"),
        _subscribed(attributes, listed, arn),
        ok("ordering", order),
        *encryption(attributes, "kms:GenerateDataKey and kms:Decrypt"),
    ]
    return found, int(attributes.get("MaximumMessageSize", MAX_MESSAGE))


async def _subscriptions(connections: Connections[Any], arn: str) -> list[Mapping[str, str]]:
    """Return what is subscribed; none where that may not be asked."""
    try:
        answer = await ask(
            connections.run(
                "sns:ListSubscriptionsByTopic", arn, lambda sns: sns.list_subscriptions_by_topic(TopicArn=arn)
            )
        )
    except AdapterError:
        return []  # their number is known from elsewhere
    return [one for one in answer.get("Subscriptions", ()) if one.get("SubscriptionArn", "").startswith("arn:")]


def _subscribed(attributes: Mapping[str, str], listed: Sequence[Mapping[str, str]], arn: str) -> Finding:
    confirmed = max(len(listed), int(attributes.get("SubscriptionsConfirmed", 0)))
    if confirmed:
        return ok("subscriptions", f"{confirmed}{', such as ' + listed[0].get('Endpoint', '') if listed else ''}")
    waiting = int(attributes.get("SubscriptionsPending", 0))
    fact = f"none ({waiting} to be confirmed): responses are lost"
    region = arn.split(":")[3]
    make = f"aws sns subscribe --region {region} --topic-arn {arn} --protocol sqs --notification-endpoint QUEUE_ARN"
    raw = "--attributes RawMessageDelivery=true, and let the queue's policy allow sqs:SendMessage to sns.amazonaws.com"
    return fail("subscriptions", fact, f"{make} {raw}")
