"""`awssqs://`: a queue of Amazon SQS, standard or FIFO, as a source of requests and as a sink of responses.

    awssqs://sqs.REGION.amazonaws.com/ACCOUNT/QUEUE?region=REGION&lease=SECONDS
    awssqs:///QUEUE?region=REGION&lease=SECONDS

Region, credentials and endpoint come from where all AWS software takes them (`AWS_*`, profiles, roles;
`AWS_ENDPOINT_URL`), the region from the URL first. The redrive policy, the visibility timeout and the largest message
are read from the queue at opening.
"""

import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from rejoinder.adapters import aws_publish
from rejoinder.adapters.aws import POOL, Connections, Traffic, Vendor
from rejoinder.adapters.driver import Outgoing
from rejoinder.adapters.errors import AdapterError, BadURL, NotFound
from rejoinder.adapters.sqs_subscription import MAX_LEASE, SQSSubscription, queue_url
from rejoinder.adapters.urls import integer, split

if TYPE_CHECKING:
    from types_aiobotocore_sqs import SQSClient
    from types_aiobotocore_sqs.literals import QueueAttributeFilterType

OPTIONS: Mapping[str, str] = {
    "region": "the queue's region; the host's, or that of the AWS configuration, by default",
    "lease": f"whole seconds from 1 to {MAX_LEASE}; the queue's visibility timeout by default",
}

ANSWER_SECONDS: Final = 10.0
"""SQS answers in tens of milliseconds."""
RECEIVING: Final = Traffic(2 * POOL, ANSWER_SECONDS + 5)  # a poll's wait counts as silence for the SDK's read timeout
SETTLING: Final = Traffic(POOL, ANSWER_SECONDS)
SENDING: Final = Traffic(POOL, ANSWER_SECONDS)

MAX_BATCH: Final = 1_048_576
"""Bytes of one SendMessageBatch."""
READ: "Final[list[QueueAttributeFilterType]]" = [
    "FifoQueue",
    "MaximumMessageSize",
    "QueueArn",
    "RedrivePolicy",
    "VisibilityTimeout",
]

_HOST: Final = re.compile(r"sqs(?:-fips)?\.(?P<region>[a-z]{2,}(?:-[a-z]+)+-[0-9]+)(?:\.[a-z0-9-]+)+(?::[0-9]+)?")
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,80}|(?=.{6,80}$)[A-Za-z0-9_-]+\.fifo")


@dataclass(frozen=True, slots=True)
class Place:
    """What a URL says."""

    url: str
    queue_url: str | None
    """None where it names the queue alone."""
    name: str
    region: str | None
    lease: int | None
    fips: bool = False

    @classmethod
    def parse(cls, url: str) -> "Place":
        """Read `url`. Raises BadURL."""
        parts, query = split(url, OPTIONS)
        lease = integer(url, query, "lease", 0, low=1, high=MAX_LEASE) or None
        *account, name = [unquote(part) for part in parts.path.split("/")[1:]] or [""]
        region = query.get("region")
        if not _NAME.fullmatch(name) or bool(parts.netloc) != (len(account) == 1) or not all(account):
            raise BadURL(
                f"{url!r} must be awssqs://sqs.REGION.amazonaws.com/ACCOUNT/QUEUE or awssqs:///QUEUE?region=REGION"
            )
        if not parts.netloc:
            return cls(url, None, name, region, lease)
        host = _HOST.fullmatch(parts.netloc)
        if host is None or not re.fullmatch("[0-9]{12}", account[0]):
            raise BadURL(
                f"{url!r} must have a host like sqs.us-east-1.amazonaws.com and an account of 12 digits; where SQS is "
                "elsewhere, write awssqs:///QUEUE?region=REGION and set AWS_ENDPOINT_URL_SQS"
            )
        if region not in {None, host["region"]}:
            raise BadURL(f"parameter 'region' is {region!r}, but the host says {host['region']!r}, in {url!r}")
        return cls(url, f"https://{parts.netloc}/{account[0]}/{name}", name, host["region"], lease, "-fips." in host[0])


@dataclass(frozen=True, slots=True)
class Queue:
    """What a queue says of itself."""

    url: str
    arn: str
    fifo: bool
    max_message: int
    visibility_timeout: int
    max_attempts: int | None
    dead_letter_arn: str | None

    @classmethod
    async def read(cls, place: Place, vendor: Vendor, connections: "Connections[SQSClient]") -> "Queue":
        """Ask the queue. Raises NotFound, Denied, Transient."""
        url = place.queue_url
        try:
            if url is None:
                url = await connections.run(
                    "sqs:GetQueueUrl", f"{place.name} in {vendor.region}", lambda sqs: queue_url(sqs, place.name)
                )
            return await connections.run("sqs:GetQueueAttributes", url, lambda sqs: cls._read(sqs, url))
        except NotFound as exc:
            raise NotFound(f"there is no queue {place.name!r} in {vendor.region} ({place.url}): {exc}") from exc

    @classmethod
    async def _read(cls, sqs: "SQSClient", url: str) -> "Queue":
        answer = await sqs.get_queue_attributes(QueueUrl=url, AttributeNames=READ)
        attributes: Mapping[Any, str] = answer.get("Attributes", {})
        policy = json.loads(attributes.get("RedrivePolicy") or "{}")
        attempts = policy.get("maxReceiveCount")
        return cls(
            url=url,
            arn=attributes["QueueArn"],
            fifo=attributes.get("FifoQueue") == "true",
            max_message=int(attributes.get("MaximumMessageSize", MAX_BATCH)),
            visibility_timeout=int(attributes.get("VisibilityTimeout", 30)),
            max_attempts=None if attempts is None else int(attempts),  # some tools write it as text
            dead_letter_arn=policy.get("deadLetterTargetArn"),
        )


class SQSTopic:
    """The sending end of a queue. A standard queue keeps no order; an ordering key is its fair-queue group."""

    def __init__(self, queue: Queue, sending: "Connections[SQSClient]") -> None:
        self.name = queue.arn
        self.max_body = queue.max_message
        self.max_keys = aws_publish.ENTRIES
        self._queue = queue
        self._sending = sending

    async def publish(self, batch: Sequence[Outgoing]) -> list[str | AdapterError]:
        """See `rejoinder.adapters.driver.Topic.publish`.

        `max_body` is for text without attributes: they count, and a body that SQS cannot carry as text takes a third
        more.
        """
        fifo = self._queue.fifo
        entries = [
            aws_publish.entry(place, outgoing, body_field="MessageBody", fifo=fifo)
            for place, outgoing in enumerate(batch)
        ]
        return await aws_publish.publish(
            entries,
            max_message=self._queue.max_message,
            max_batch=MAX_BATCH,
            send=self._send,
        )

    async def _send(self, entries: Any) -> Mapping[str, aws_publish.Outcome]:
        return await self._sending.run(
            "sqs:SendMessage",
            self.name,
            lambda sqs: aws_publish.told(
                sqs.send_message_batch(QueueUrl=self._queue.url, Entries=entries), "sqs:SendMessage", self.name
            ),
        )


@asynccontextmanager
async def open_subscription(url: str) -> AsyncIterator[SQSSubscription]:
    """Open the receiving end of the queue that `url` names. Raises BadURL, NotFound, Denied, Transient."""
    place = Place.parse(url)
    async with AsyncExitStack() as stack:
        vendor = Vendor(url, place.region, stack, fips=place.fips)
        settling = await vendor.connect("sqs", SETTLING)
        queue = await Queue.read(place, vendor, settling)
        lease = place.lease or queue.visibility_timeout
        if not lease:
            raise BadURL(f"the visibility timeout of {queue.arn} is 0: add lease=SECONDS to {url!r}")
        receiving = await vendor.connect("sqs", RECEIVING)
        subscription = SQSSubscription(queue, lease, receiving, settling)
        stack.push_async_callback(subscription.close)
        yield subscription


@asynccontextmanager
async def open_topic(url: str) -> AsyncIterator[SQSTopic]:
    """Open the sending end of the queue that `url` names. Raises as `open_subscription` does."""
    place = Place.parse(url)
    async with AsyncExitStack() as stack:
        vendor = Vendor(url, place.region, stack, fips=place.fips)
        sending = await vendor.connect("sqs", SENDING)
        yield SQSTopic(await Queue.read(place, vendor, sending), sending)
