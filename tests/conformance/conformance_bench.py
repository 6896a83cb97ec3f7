"""What the tests of this folder have in their hands: one adapter, and queues on it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from brokers import Broker, Queue

from rejoinder.adapters import AdapterError, Message, Outgoing, Subscription, Topic, open_subscription, open_topic

CLOCK = 0.01  # seconds between two readings of one clock by two callers that are still "the same time"


class Bench:
    """One adapter under test, with queues that are made, opened and closed for the test."""

    def __init__(self, broker, directory, stack):
        self.broker: Broker = broker
        self._directory = directory
        self._stack: AsyncExitStack = stack

    async def queue(self, lease: float = 60, max_attempts: int | None = None) -> Queue:
        return await self.broker.make(self._directory, lease, max_attempts)

    async def subscription(self, url: str) -> Subscription:
        return await self._stack.enter_async_context(open_subscription(url))

    async def topic(self, url: str) -> Topic:
        return await self._stack.enter_async_context(open_topic(url))

    async def pair(self, lease: float = 60, max_attempts: int | None = None) -> tuple[Subscription, Topic]:
        queue = await self.queue(lease, max_attempts)
        return await self.subscription(queue.subscription), await self.topic(queue.topic)

    async def get(self, subscription: Subscription, count: int = 1) -> list[Message]:
        """Receive exactly `count` messages, or fail."""
        got: list[Message] = []
        deadline = time.monotonic() + self.broker.patience
        while len(got) < count:
            assert time.monotonic() < deadline, f"{len(got)} of {count} messages after {self.broker.patience} s"
            got += await subscription.receive(count - len(got), 1)
        return got

    async def nothing(self, subscription: Subscription) -> bool:
        return await subscription.receive(1, 0) == []

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        """Wait for `condition`, or fail."""
        async with asyncio.timeout(self.broker.patience):
            while not await condition():
                await asyncio.sleep(0.005)

    def attempt(self, number: int, *, policy: bool = False) -> int | None:
        """What `attempt` of the delivery with this number is, on a queue with or without a dead-letter policy."""
        return number if self.broker.counts_attempts and (policy or self.broker.counts_without_policy) else None

    async def last_attempt(self, subscription: Subscription) -> Message:
        """Let the only message go until it has one delivery left, and take that."""
        assert subscription.max_attempts is not None
        for number in range(1, subscription.max_attempts):
            (message,) = await self.get(subscription)
            assert message.attempt == self.attempt(number, policy=True)
            assert await subscription.set_lease([message], 0) == [None]
        (message,) = await self.get(subscription)
        return message


async def put(topic: Topic, *bodies: bytes) -> list[str]:
    """Publish, and give the ids."""
    ids = await topic.publish([Outgoing(body) for body in bodies])
    for one in ids:
        if isinstance(one, AdapterError):
            raise one
    return [str(one) for one in ids]
