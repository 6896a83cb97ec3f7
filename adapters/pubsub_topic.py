"""The sending end of Pub/Sub."""

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from rejoinder.adapters.driver import NO_POINTERS, Outgoing
from rejoinder.adapters.errors import AdapterError, Denied, Refused, TooLarge, Transient
from rejoinder.adapters.pubsub_wire import (
    CALL_SECONDS,
    GET_TOPIC,
    PUBLISH,
    Connection,
    GetTopicRequest,
    PublishRequest,
    PubsubMessage,
    cause,
)

REQUEST_BYTES = 10_000_000
"""What the service takes in one request."""
REQUEST_MESSAGES = 1_000
MAX_BODY = REQUEST_BYTES - 20_000
"""The rest is for the topic's name, the ordering key and nine attributes of the longest."""
PUBLISH_SECONDS = 60.0
"""10 MB over 1.4 Mbit/s."""
CONCURRENCY = 16
"""Requests at once from one `publish`: ordering keys cannot share one, and a round trip takes tens of milliseconds."""
PUBLISH_PERMISSION = "roles/pubsub.publisher on the topic (pubsub.topics.publish)"
READ_PERMISSION = "roles/pubsub.viewer on the topic (pubsub.topics.get)"

_SEEN_NAMES: set[str] = set()
"""Attribute names found to be good: there are few, and they come with every message."""


class PubSubTopic:
    """A topic. It must be reached through one regional endpoint if ordering keys are to keep order between senders."""

    max_body = MAX_BODY
    max_keys = 1

    def __init__(self, connection: Connection, resource: str) -> None:
        self.name = f"gcppubsub://{resource}"
        self._resource = resource
        channel = connection.channel()
        self._get = channel.call(GET_TOPIC, resource, READ_PERMISSION)
        self._publish = channel.call(PUBLISH, resource, PUBLISH_PERMISSION)

    async def read(self) -> None:
        """Find out whether the topic is there.

        A sender needs no permission for that (roles/pubsub.publisher has none): without it, a topic that is not there
        is found out by the first `publish`.

        Raises:
            NotFound, Denied, Transient: as their names say.
        """
        try:
            await self._get(GetTopicRequest(topic=self._resource), CALL_SECONDS)
        except Denied as exc:
            if cause(exc) is not grpc.StatusCode.PERMISSION_DENIED:
                raise

    async def publish(self, batch: Sequence[Outgoing]) -> list[str | AdapterError]:
        """See `rejoinder.adapters.driver.Topic.publish`."""
        messages = [_message(outgoing) for outgoing in batch]
        outcomes: list[str | AdapterError] = [Transient("not sent")] * len(batch)
        groups: dict[str, list[int]] = {}
        for number, outgoing in enumerate(batch):
            if len(outgoing.body) > MAX_BODY:
                outcomes[number] = TooLarge(f"the body has {len(outgoing.body)} bytes, over the {MAX_BODY} of Pub/Sub")
            else:
                groups.setdefault(outgoing.ordering_key or "", []).append(number)
        sending = _Sending(self.name, self._send, messages, outcomes)
        turns = [deque([part]) for part in _parts(messages, groups.pop("", []))]
        turns += [deque(_parts(messages, numbers)) for numbers in groups.values()]
        await asyncio.gather(*map(sending.in_turn, turns))
        return outcomes

    async def _send(self, messages: list[Any]) -> list[str] | AdapterError:
        try:
            response = await self._publish(PublishRequest(topic=self._resource, messages=messages), PUBLISH_SECONDS)
        except AdapterError as exc:
            if isinstance(exc, Denied) and cause(exc) is grpc.StatusCode.INVALID_ARGUMENT:
                return Refused(str(exc))  # by the topic's own rules: all others were checked before
            return exc
        return list(response.message_ids)


class _Sending:
    """One call of `publish`: its messages, and what became of them."""

    def __init__(
        self,
        name: str,
        send: Callable[[list[Any]], Awaitable[list[str] | AdapterError]],
        messages: Sequence[Any],
        outcomes: list[str | AdapterError],
    ) -> None:
        self._name = name
        self._send = send
        self._messages = messages
        self._outcomes = outcomes
        self._room = asyncio.Semaphore(CONCURRENCY)

    async def in_turn(self, parts: deque[list[int]]) -> None:
        """Send requests one after the other; each is a list of the messages' places."""
        while parts:
            part = parts.popleft()
            failure = await self._one(part)
            ordered = self._messages[part[0]].ordering_key
            if isinstance(failure, Refused | TooLarge):
                # One message that is refused fails its request, and which one is not said: it is found by halves.
                half = len(part) // 2
                halves = [part[:half], part[half:]] if half else []
                if ordered:
                    parts.extendleft(reversed(halves))
                else:
                    await asyncio.gather(*(self.in_turn(deque([one])) for one in halves))
            elif failure and ordered:
                held = Transient(f"{self._name}: held back, because a message before it of its ordering key failed")
                for number in itertools.chain.from_iterable(parts):
                    self._outcomes[number] = held
                return

    async def _one(self, numbers: list[int]) -> AdapterError | None:
        async with self._room:
            outcome = await self._send([self._messages[number] for number in numbers])
        for place, number in enumerate(numbers):
            self._outcomes[number] = outcome if isinstance(outcome, AdapterError) else outcome[place]
        return outcome if isinstance(outcome, AdapterError) else None


def _message(outgoing: Outgoing) -> Any:
    """Make the protobuf message. Raises ValueError for what Pub/Sub cannot carry."""
    if outgoing.stored_at is not None:
        raise ValueError(NO_POINTERS)
    for name, value in outgoing.attributes.items():
        if name not in _SEEN_NAMES:
            if not 0 < len(name.encode()) <= 256 or name.startswith("goog"):
                raise ValueError(f"attribute name {name!r} must have 1 to 256 bytes and not start with 'goog'")
            if len(_SEEN_NAMES) < 1000:
                _SEEN_NAMES.add(name)
        if len(value) > 256 and len(value.encode()) > 1024:  # a character has 4 bytes at most
            raise ValueError(f"the value of attribute {name!r} has {len(value.encode())} bytes; Pub/Sub takes 1024")
    if not outgoing.body and not outgoing.attributes:
        raise ValueError("Pub/Sub carries no message that has neither a body nor attributes")
    message = PubsubMessage(data=outgoing.body)
    attributes = message.attributes
    for name, value in outgoing.attributes.items():  # the constructor takes four times as long for them
        attributes[name] = value
    if outgoing.ordering_key:
        if len(outgoing.ordering_key.encode()) > 1024:
            raise ValueError(f"the ordering key has {len(outgoing.ordering_key.encode())} bytes; Pub/Sub takes 1024")
        message.ordering_key = outgoing.ordering_key
    return message


def _parts(messages: Sequence[Any], numbers: Sequence[int]) -> list[list[int]]:
    """Cut into requests that the service takes."""
    parts: list[list[int]] = []
    size = REQUEST_BYTES
    for number in numbers:
        length = messages[number].ByteSize() + 8
        if size + length > REQUEST_BYTES or len(parts[-1]) == REQUEST_MESSAGES:
            parts.append([])
            size = 1_000  # the topic's name
        parts[-1].append(number)
        size += length
    return parts
