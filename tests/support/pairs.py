"""Fresh queues for a test on each broker and each mix of two, and what a test does at the far ends of a worker."""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from rejoinder.adapters import Message, Outgoing, open_subscription, open_topic

LIMIT = 120.0
QUIET = 1.0
"""Seconds without a message after which a queue that nobody publishes to any more is believed to be empty."""


@dataclass(frozen=True)
class End:
    """One queue by the two URLs that it has."""

    topic: str
    """Where messages are published."""
    subscription: str
    """Where they are received."""


class Queues:
    """The requests' queue and the responses' queue of one test.

    `requests` and `responses` are what the worker is given; the test stands at the other ends.
    """

    def __init__(self, requests: End, responses: End, lease: float) -> None:
        self.requests, self.outbox = requests.subscription, requests.topic
        self.responses, self.inbox = responses.topic, responses.subscription
        self.lease = lease

    async def send(self, *bodies: bytes, key: str | None = None) -> list[str]:
        """Publish requests, all of one ordering key if given, and return their message ids."""
        outcomes: list[object] = []
        async with open_topic(self.outbox) as topic:
            for start in range(0, len(bodies), 1000):
                outcomes += await topic.publish([_outgoing(body, key) for body in bodies[start:][:1000]])
        failed = [outcome for outcome in outcomes if not isinstance(outcome, str)]
        assert not failed, (len(failed), failed[0])
        return [str(outcome) for outcome in outcomes]

    async def receive(self, count: int, limit: float = LIMIT, got: list[Message] | None = None) -> list[Message]:
        """Receive and ack responses until `count` different requests are answered; return all that came.

        Args:
            count: Different requests.
            limit: Seconds after which the test fails.
            got: What came before, which counts too; extended.
        """
        got = [] if got is None else got
        answered = {message.attributes["request_message_id"] for message in got}
        deadline = time.monotonic() + limit
        async with open_subscription(self.inbox) as subscription:
            while len(answered) < count:
                left = deadline - time.monotonic()
                assert left > 0, f"{len(answered)} of {count} requests were answered in {limit:g} s"
                messages = await subscription.receive(500, min(left, 5.0))
                await subscription.ack(messages)
                got += messages
                answered |= {message.attributes["request_message_id"] for message in messages}
        return got

    async def receive_some(self, wait: float = 0.05) -> list[Message]:
        """Receive and ack responses until none comes for `wait` seconds."""
        return await _drain(self.inbox, wait)

    async def left_over(self) -> list[Message]:
        """What the requests' queue still holds. For when no worker runs.

        Whatever is not settled comes within a lease, so nothing must be counted, which not every broker can.
        """
        return await _drain(self.requests, self.lease + QUIET)

    async def until_settled(self, limit: float = LIMIT) -> None:
        """Wait until no request is waiting or held. For a broker that counts exactly."""
        deadline = time.monotonic() + limit
        async with open_subscription(self.requests) as subscription:
            while True:
                backlog = await subscription.backlog()
                if backlog.waiting + backlog.held == 0:
                    return
                assert time.monotonic() < deadline, backlog
                await asyncio.sleep(0.02)


def _outgoing(body: bytes, key: str | None) -> Outgoing:
    # Pub/Sub takes an empty body only beside an attribute.
    return Outgoing(body, {} if body else {"empty": "yes"}, key)


async def _drain(url: str, wait: float) -> list[Message]:
    got: list[Message] = []
    async with open_subscription(url) as subscription:
        while messages := await subscription.receive(1000, wait):
            await subscription.ack(messages)
            got += messages
    return got


def sqlite(folder: Path, lease: float = 30.0) -> Queues:
    """Two queues in one file."""
    base = f"sqlite:///{folder / 'queues.db'}?queue="
    requests, responses = f"{base}requests", f"{base}responses"
    return Queues(End(requests, f"{requests}&lease={lease:g}"), End(responses, responses), lease)
