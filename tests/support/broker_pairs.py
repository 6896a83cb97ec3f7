"""The brokers that stand before and behind a worker in the tests of whole runs. A new one is one more line here."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import cloud_queues
import pytest
from pairs import End, Queues


@dataclass(frozen=True)
class Broker:
    fixture: str
    """What must be up: `aws` or `gcp`."""
    make: Callable[[float, int | None], Awaitable[End]]
    """(lease in seconds, max_attempts)."""
    lease: float
    """The shortest worth testing with: SQS takes whole seconds, Pub/Sub nothing below 10."""


BROKERS = {
    "sqs": Broker("aws", cloud_queues.sqs, 2.0),
    "fifo": Broker("aws", cloud_queues.sqs_fifo, 2.0),
    "sns": Broker("aws", cloud_queues.sns, 2.0),
    "pubsub": Broker("gcp", cloud_queues.pubsub, 10.0),
    "ordered": Broker("gcp", cloud_queues.pubsub_ordered, 10.0),
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
        # The test receives responses; as it acks at once, no short lease is wanted there.
        return Queues(requests, await self._responses.make(30.0, None), lease)


def pair_of(request: pytest.FixtureRequest, name: str) -> Pair:
    """The pair of this name, with the emulators that it needs up."""
    pair = Pair(name)
    for fixture in sorted(pair.fixtures):
        request.getfixturevalue(fixture)
    return pair


def on(*names: str) -> pytest.MarkDecorator:
    """Run the test, which takes a `pair`, on each of these."""
    return pytest.mark.parametrize("pair", names, indirect=True)
