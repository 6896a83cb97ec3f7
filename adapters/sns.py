"""`awssns:///ARN`: a topic of Amazon SNS, standard or FIFO, as a sink of responses.

    awssns:///arn:aws:sns:REGION:ACCOUNT:TOPIC?region=REGION

Who wants to read them subscribes an SQS queue to the topic, with raw delivery or without: `awssqs://` knows both.
Publishing needs `sns:Publish` alone; the topic's limits are read where `sns:GetTopicAttributes` is allowed too.
"""

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from rejoinder.adapters import aws_errors, aws_publish
from rejoinder.adapters.aws import POOL, Connections, Traffic, Vendor
from rejoinder.adapters.driver import NO_POINTERS, Outgoing, Subscription
from rejoinder.adapters.errors import AdapterError, BadURL, Denied
from rejoinder.adapters.urls import split

if TYPE_CHECKING:
    from types_aiobotocore_sns import SNSClient

OPTIONS: Mapping[str, str] = {"region": "the topic's region; the ARN's by default"}
SENDING: Final = Traffic(POOL, 10.0)
MAX_MESSAGE: Final = 262_144
"""Bytes of one message, or of one batch, unless the topic's MaximumMessageSize says otherwise (up to 1 MiB)."""

_ARN: Final = re.compile(
    r"arn:aws[a-z-]*:sns:(?P<region>[a-z0-9-]+):[0-9]{12}:(?P<name>[A-Za-z0-9_-]{1,256}(?:\.fifo)?)"
)


class SNSTopic:
    """A topic. What is published to a standard topic keeps no order; an ordering key is its fair-queue group."""

    def __init__(self, arn: str, max_message: int, sending: "Connections[SNSClient]") -> None:
        self.name = arn
        self.max_body = max_message
        self.max_keys = aws_publish.ENTRIES
        self._fifo = arn.endswith(".fifo")
        self._sending = sending

    async def publish(self, batch: Sequence[Outgoing]) -> list[str | AdapterError]:
        """See `rejoinder.adapters.driver.Topic.publish`; of `max_body`, what `SQSTopic.publish` says."""
        if any(outgoing.stored_at is not None for outgoing in batch):
            raise ValueError(NO_POINTERS)
        entries = [
            aws_publish.entry(place, outgoing, body_field="Message", fifo=self._fifo)
            for place, outgoing in enumerate(batch)
        ]
        return await aws_publish.publish(
            entries,
            max_message=self.max_body,
            max_batch=self.max_body,
            send=self._send,
        )

    async def _send(self, entries: Any) -> Mapping[str, aws_publish.Outcome]:
        return await self._sending.run(
            "sns:Publish",
            self.name,
            lambda sns: aws_publish.told(
                sns.publish_batch(TopicArn=self.name, PublishBatchRequestEntries=entries), "sns:Publish", self.name
            ),
        )


def parse(url: str) -> tuple[str, str]:
    """Return the ARN and the region that `url` names. Raises BadURL."""
    parts, query = split(url, OPTIONS)
    arn = unquote(parts.path[1:])
    found = _ARN.fullmatch(arn)
    if parts.netloc or found is None:
        raise BadURL(f"{url!r} must be awssns:///arn:aws:sns:REGION:ACCOUNT:TOPIC, with three slashes")
    if query.get("region", found["region"]) != found["region"]:
        raise BadURL(f"parameter 'region' is {query['region']!r}, but the ARN says {found['region']!r}, in {url!r}")
    return arn, found["region"]


async def _max_message(arn: str, sending: "Connections[SNSClient]") -> int:
    async def read(sns: "SNSClient") -> int:
        answer = await sns.get_topic_attributes(TopicArn=arn)
        return int(answer.get("Attributes", {}).get("MaximumMessageSize", MAX_MESSAGE))

    try:
        return await sending.run("sns:GetTopicAttributes", arn, read)
    except Denied as exc:
        # A role that may only publish is a good role. Whether it may even do that, the first response shows.
        if not aws_errors.is_forbidden(exc):
            raise
        return MAX_MESSAGE


@asynccontextmanager
async def open_topic(url: str) -> AsyncIterator[SNSTopic]:
    """Open the topic that `url` names.

    Raises:
        BadURL: `url` names no topic.
        NotFound: there is none of this name.
        Denied: the credentials are not accepted at all. Whether they allow `sns:Publish`, only publishing shows.
        Transient: SNS does not answer.
    """
    arn, region = parse(url)
    async with AsyncExitStack() as stack:
        sending = await Vendor(url, region, stack).connect("sns", SENDING)
        yield SNSTopic(arn, await _max_message(arn, sending), sending)


@asynccontextmanager
async def open_subscription(url: str) -> AsyncIterator[Subscription]:
    """Refuse: SNS delivers, it cannot be asked. Raises BadURL."""
    arn, _ = parse(url)
    raise BadURL(f"nobody can receive from a topic: subscribe an SQS queue to {arn} and receive from awssqs:///QUEUE")
    yield
