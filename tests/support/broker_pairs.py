"""The brokers that stand before and behind a worker in the tests of whole runs. A new one is one more line here."""

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aws_resources
import pubsub_resources
import pytest
from pairs import End, Queues


async def sqs(lease: float, max_attempts: int | None, *, fifo: bool = False) -> End:
    arn, _ = await aws_resources.make_queue(fifo=fifo, max_attempts=max_attempts, VisibilityTimeout=round(lease))
    return End(_queue(arn), _queue(arn))


async def sqs_fifo(lease: float, max_attempts: int | None) -> End:
    return await sqs(lease, max_attempts, fifo=True)


async def sns(lease: float, max_attempts: int | None) -> End:
    """A topic and a queue that is subscribed to it, raw."""
    arn, _ = await aws_resources.make_queue(max_attempts=max_attempts, VisibilityTimeout=round(lease))
    return End(f"awssns:///{await aws_resources.make_topic(arn, raw=True)}", _queue(arn))


def _queue(arn: str) -> str:
    return f"awssqs:///{aws_resources.name_of(arn)}?region={os.environ['AWS_DEFAULT_REGION']}"


async def pubsub(lease: float, max_attempts: int | None, **settings: object) -> End:
    subscription, topic, _ = await pubsub_resources.make(lease, max_attempts, **settings)
    return End(f"gcppubsub://{topic}", f"gcppubsub://{subscription}")


async def pubsub_ordered(lease: float, max_attempts: int | None) -> End:
    return await pubsub(lease, max_attempts, enable_message_ordering=True)


@dataclass(frozen=True)
class Broker:
    fixture: str
    """What must be up: `aws` or `gcp`."""
    make: Callable[[float, int | None], Awaitable[End]]
    """Make a queue that nobody has used: (lease in seconds, max_attempts)."""
    lease: float
    """The shortest worth testing with: SQS takes whole seconds, Pub/Sub nothing below 10."""


BROKERS = {
    "sqs": Broker("aws", sqs, 2.0),
    "fifo": Broker("aws", sqs_fifo, 2.0),
    "sns": Broker("aws", sns, 2.0),
    "pubsub": Broker("gcp", pubsub, 10.0),
    "ordered": Broker("gcp", pubsub_ordered, 10.0),
}


class Pair:
    """Where requests come from and where responses go, such as `sqs>pubsub`; `sqs` alone is both."""

    def __init__(self, name: str) -> None:
        requests, _, responses = name.partition(">")
        self.name = name
        self._requests, self._responses = BROKERS[requests], BROKERS[responses or requests]
        self.fixtures = {self._requests.fixture, self._responses.fixture}

    async def queues(self, lease: float | None = None, max_attempts: int | None = None) -> Queues:
        """Make both queues; `lease` and `max_attempts` are of the requests."""
        lease = lease or self._requests.lease
        requests = await self._requests.make(lease, max_attempts)
        # The test acks responses at once. The Pub/Sub emulator may give some to a poll that was given up: for a lease.
        return Queues(requests, await self._responses.make(10.0, None), lease)


def pair_of(request: pytest.FixtureRequest, name: str) -> Pair:
    """The pair of this name, with the emulators that it needs up."""
    pair = Pair(name)
    for fixture in sorted(pair.fixtures):
        request.getfixturevalue(fixture)
    return pair


def on(*names: str) -> pytest.MarkDecorator:
    """Run the test, which takes a `pair`, on each of these."""
    return pytest.mark.parametrize("pair", names, indirect=True)
