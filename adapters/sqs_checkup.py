"""What can be found out about an SQS queue without receiving or sending."""

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any, Final

from rejoinder.adapters.aws import Connections, Vendor
from rejoinder.adapters.aws_checkup import ASKING, encryption, probe, reached, unreachable
from rejoinder.adapters.checkup import Checkup, Finding, advice, ask
from rejoinder.adapters.errors import AdapterError
from rejoinder.adapters.sqs import Place, Queue
from rejoinder.adapters.sqs_policies import dead_letters, messages, queue_policies, size_limit, waiting_policies
from rejoinder.adapters.sqs_subscription import HOLD_MARGIN, MAX_LEASE

NO_RECEIPT: Final = "rejoinder-doctor"
NO_TEXT: Final = "\ufffe"
"""Not a character of XML, so SQS takes no message of it; the delay is out of range besides."""
TOO_LATE: Final = 901


class Asked:
    """A queue that has answered, and its settings."""

    def __init__(self, queue: Queue, connections: Connections[Any], attributes: Mapping[str, str]) -> None:
        self.queue = queue
        self.connections = connections
        self.attributes = attributes
        region = queue.arn.split(":")[3]
        self.change = f"aws sqs set-queue-attributes --region {region} --queue-url {queue.url} --attributes "

    @classmethod
    async def ask(cls, place: Place, vendor: Vendor) -> "Asked":
        """Ask for everything. Raises AdapterError."""
        connections = await vendor.connect("sqs", ASKING)
        queue = await ask(Queue.read(place, vendor, connections))
        return cls(queue, connections, await attributes_of(connections, queue.url, queue.arn))

    async def probe(self, check: str, action: str, **request: Any) -> Finding:
        """See whether `action` is allowed, by a request of it that cannot succeed."""
        method = {
            "sqs:ReceiveMessage": "receive_message",
            "sqs:DeleteMessage": "delete_message_batch",
            "sqs:ChangeMessageVisibility": "change_message_visibility_batch",
            "sqs:SendMessage": "send_message_batch",
        }[action]
        url, arn = self.queue.url, self.queue.arn
        return await probe(
            self.connections, check, action, arn, lambda sqs: getattr(sqs, method)(QueueUrl=url, **request)
        )


async def attributes_of(connections: Connections[Any], url: str, resource: str) -> Mapping[str, str]:
    """Return all attributes of the queue at `url`. Raises AdapterError."""
    action = "sqs:GetQueueAttributes"
    found = await ask(
        connections.run(action, resource, lambda sqs: sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"]))
    )
    attributes: Mapping[str, str] = found.get("Attributes", {})
    return attributes


def _unreachable(exc: AdapterError, place: Place, vendor: Vendor) -> Checkup:
    fifo = ",FifoQueue=true" if place.name.endswith(".fifo") else ""
    attributes = f"VisibilityTimeout=60,MessageRetentionPeriod=1209600{fifo}"
    create = f"aws sqs create-queue --region {vendor.region} --queue-name {place.name} --attributes {attributes}"
    return Checkup([unreachable(exc, "sqs", "sqs:GetQueueAttributes", create)])


async def check_subscription(url: str) -> Checkup:
    """See `rejoinder.adapters.urls.check_subscription`."""
    place = Place.parse(url)
    async with AsyncExitStack() as stack:
        vendor = Vendor(url, place.region, stack, fips=place.fips)
        try:
            asked = await Asked.ask(place, vendor)
        except AdapterError as exc:
            return _unreachable(exc, place, vendor)
        queue, attributes = asked.queue, asked.attributes
        receipt = {"Id": "0", "ReceiptHandle": NO_RECEIPT}
        found = [
            reached(queue.arn, "sqs"),
            await asked.probe(
                "permission to receive",
                "sqs:ReceiveMessage",
                MaxNumberOfMessages=11,
                WaitTimeSeconds=21,
                VisibilityTimeout=MAX_LEASE + 1,
            ),
            await asked.probe("permission to acknowledge", "sqs:DeleteMessage", Entries=[receipt]),
            await asked.probe(
                "permission to renew", "sqs:ChangeMessageVisibility", Entries=[{**receipt, "VisibilityTimeout": 60}]
            ),
            *waiting_policies(attributes, place.lease, asked.change),
            *await _dead_letters(asked),
            *queue_policies(attributes, asked.change),
            *encryption(attributes, "kms:Decrypt"),
            messages(attributes),
        ]
        hold = float(MAX_LEASE - HOLD_MARGIN)
        return Checkup(found, frozenset({queue.arn}), queue.max_attempts, hold, queue.max_message)


async def check_topic(url: str) -> Checkup:
    """See `rejoinder.adapters.urls.check_topic`."""
    place = Place.parse(url)
    async with AsyncExitStack() as stack:
        vendor = Vendor(url, place.region, stack, fips=place.fips)
        try:
            asked = await Asked.ask(place, vendor)
        except AdapterError as exc:
            return _unreachable(exc, place, vendor)
        queue, attributes = asked.queue, asked.attributes
        entry = {"Id": "0", "MessageBody": NO_TEXT, "DelaySeconds": TOO_LATE}
        if queue.fifo:
            entry |= {"MessageGroupId": NO_RECEIPT, "MessageDeduplicationId": NO_RECEIPT}
        found = [
            reached(queue.arn, "sqs"),
            await asked.probe("permission to send", "sqs:SendMessage", Entries=[entry]),
            *queue_policies(attributes, asked.change),
            *encryption(attributes, "kms:GenerateDataKey and kms:Decrypt"),
            size_limit(attributes, asked.change),
            messages(attributes),
        ]
        return Checkup(found, frozenset({queue.arn}), max_body=queue.max_message)


async def _dead_letters(asked: Asked) -> list[Finding]:
    """Judge the redrive policy, and the queue that it names."""
    arn = asked.queue.dead_letter_arn
    if arn is None:
        return dead_letters(asked.queue, asked.attributes, None, asked.change)
    account, name = arn.split(":")[4:6]
    try:
        found = await ask(
            asked.connections.run(
                "sqs:GetQueueUrl",
                arn,
                lambda sqs: sqs.get_queue_url(QueueName=name, QueueOwnerAWSAccountId=account),
            )
        )
        dead = await attributes_of(asked.connections, found["QueueUrl"], arn)
    except AdapterError as exc:
        todo = f"make it, or see it: doctor needs sqs:GetQueueUrl and sqs:GetQueueAttributes on {arn}"
        return [advice("dead-letter queue", str(exc), todo)]
    return dead_letters(asked.queue, asked.attributes, dead, asked.change)
