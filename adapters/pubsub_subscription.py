"""The receiving end of Pub/Sub: unary pulls, and what settles their messages."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import grpc

from rejoinder.adapters.driver import Backlog, Message
from rejoinder.adapters.errors import AdapterError, BadURL, LeaseLost, NotFound, Transient
from rejoinder.adapters.pubsub_pulls import LINGER_SECONDS, Pulls
from rejoinder.adapters.pubsub_wire import (
    ACKNOWLEDGE,
    CALL_SECONDS,
    GET_SUBSCRIPTION,
    MODIFY,
    PULL,
    AcknowledgeRequest,
    Connection,
    GetSubscriptionRequest,
    ModifyAckDeadlineRequest,
    PullRequest,
    ack_failures,
    cause,
)

MAX_RECEIVE = 100
"""A pull is bounded by its count alone, so this is also what bounds memory: at most 1 GB, if all are of 10 MB. It is
what the emulator and the service fill in one round trip; more at once is several receives."""
MAX_LEASE = 600.0
SETTLE_IDS = 2_500
"""In one request, as Google's clients do: one may have 512 KiB, and an ack id has about 200 bytes."""
SETTLE_BYTES = 500_000
CONSUME = "roles/pubsub.subscriber (pubsub.subscriptions.consume)"
READ = "roles/pubsub.viewer on the subscription (pubsub.subscriptions.get)"
TRACE, GOOGLE_TRACE = "traceparent", "googclient_traceparent"
NO_ATTRIBUTES: Mapping[str, str] = MappingProxyType({})


class PubSubSubscription:
    """A pull subscription.

    A lease that was lost is told by exactly-once subscriptions only: elsewhere the service takes a stale ack, which may
    or may not have an effect, and the message may come once more. Attempts are counted only where the subscription has
    a dead-letter policy. How many messages wait is known to Cloud Monitoring alone, and not asked here.
    """

    max_lease_seconds = MAX_LEASE
    max_hold_seconds = math.inf
    max_receive = MAX_RECEIVE

    def __init__(self, connection: Connection, resource: str) -> None:
        self.name = f"gcppubsub://{resource}"
        self.lease_seconds = 10.0
        self.max_attempts: int | None = None
        self.keeps_order = False
        self.exactly_once = False
        self._resource = resource
        # What renews and settles leases must not wait behind a large pull.
        settling = connection.channel()
        self._get = settling.call(GET_SUBSCRIPTION, resource, READ)
        self._acknowledge = settling.call(ACKNOWLEDGE, resource, CONSUME)
        self._modify = settling.call(MODIFY, resource, CONSUME)
        self._pull = connection.channel().call(PULL, resource, CONSUME)
        self._pulls = Pulls(self._pull_once, self._let_go)
        self._pulling = asyncio.Lock()

    async def read(self) -> None:
        """Ask the service what the subscription is like.

        Raises:
            NotFound, Denied, Transient: as their names say.
            BadURL: it is not one that can be pulled from.
        """
        info = await self._describe()
        pushes = [
            what
            for what, given in (
                ("push_config", info.push_config.push_endpoint),
                ("bigquery_config", info.bigquery_config.table),
                ("cloud_storage_config", info.cloud_storage_config.bucket),
            )
            if given
        ]
        if pushes:
            raise BadURL(f"{self.name} has a {pushes[0]}, so it delivers there: make a subscription of type pull")
        self.lease_seconds = float(info.ack_deadline_seconds)
        # Leases run from the pull on; who receives is to find them nearly whole.
        self._pulls.keep_seconds = min(LINGER_SECONDS, self.lease_seconds / 5)
        self.max_attempts = info.dead_letter_policy.max_delivery_attempts or None
        self.keeps_order = info.enable_message_ordering
        self.exactly_once = info.enable_exactly_once_delivery

    async def _describe(self) -> Any:
        info = await self._get(GetSubscriptionRequest(subscription=self._resource), CALL_SECONDS)
        if info.detached or info.topic == "_deleted-topic_":
            raise NotFound(f"{self.name} is detached from its topic, or that is deleted: make both again")
        return info

    async def receive(self, limit: int, wait: float) -> list[Message]:
        """See `rejoinder.adapters.driver.Subscription.receive`. Waiting 0 asks for what the service has at hand."""
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        if not self.keeps_order:
            return await self._pulls.receive(min(limit, MAX_RECEIVE), wait)
        # One pull at a time: two may each bring messages of one key, and their answers overtake each other.
        clock = asyncio.get_running_loop().time
        deadline = clock() + wait
        try:
            async with asyncio.timeout(wait):
                await self._pulling.acquire()
        except TimeoutError:
            return []
        try:
            return await self._pulls.receive(min(limit, MAX_RECEIVE), max(deadline - clock(), 0))
        finally:
            self._pulling.release()

    async def _pull_once(self, limit: int, seconds: float, immediately: bool) -> list[Message]:
        request = PullRequest(subscription=self._resource, max_messages=limit, return_immediately=immediately)
        try:
            response = await self._pull(request, seconds)
        except Transient as exc:
            if cause(exc) is grpc.StatusCode.DEADLINE_EXCEEDED and not immediately:
                return []  # how a poll ends that nobody answered
            raise
        return [self._message(received) for received in response.received_messages]

    def _message(self, received: Any) -> Message:
        message = received.message
        published = message.publish_time
        return Message(
            message.message_id,
            message.data,
            _attributes(message.attributes),
            received.delivery_attempt or None,
            published.seconds + published.nanos / 1e9,
            received.ack_id,
            message.ordering_key or None,
        )

    async def ack(self, messages: Sequence[Message]) -> list[AdapterError | None]:
        """See `rejoinder.adapters.driver.Subscription.ack`."""
        return await self._settle(messages, self._acknowledge, AcknowledgeRequest, {})

    async def set_lease(self, messages: Sequence[Message], seconds: float) -> list[AdapterError | None]:
        """See `rejoinder.adapters.driver.Subscription.set_lease`. The service knows whole seconds: rounded up."""
        if not 0 <= seconds <= MAX_LEASE:
            raise ValueError(f"seconds must be from 0 to {MAX_LEASE:g}, not {seconds}")
        fields = {"ack_deadline_seconds": math.ceil(seconds)}
        return await self._settle(messages, self._modify, ModifyAckDeadlineRequest, fields)

    async def _settle(
        self, messages: Sequence[Message], call: Any, request: Any, fields: Mapping[str, int]
    ) -> list[AdapterError | None]:
        async def one(part: Sequence[Message]) -> list[AdapterError | None]:
            ids = [cast("str", message.lease) for message in part]
            try:
                await call(request(subscription=self._resource, ack_ids=ids, **fields), CALL_SECONDS)
            except AdapterError as exc:
                return self._failures(part, exc)
            return [None] * len(part)

        outcomes = await asyncio.gather(*(one(part) for part in _parts(messages)))
        return [outcome for part in outcomes for outcome in part]

    def _failures(self, messages: Sequence[Message], exc: AdapterError) -> list[AdapterError | None]:
        """Tell each message's outcome. Of an id that is not named Google's own clients disagree: said again, it is."""
        failed = ack_failures(exc)
        if not failed:
            if cause(exc) is grpc.StatusCode.INVALID_ARGUMENT:  # an ack id; which one is known only if it is alone
                exc = LeaseLost(str(exc)) if len(messages) == 1 else Transient(str(exc))
            return [exc] * len(messages)
        outcomes: list[AdapterError | None] = []
        for message in messages:
            reason = failed.get(cast("str", message.lease), "not settled, because others of its request failed")
            if reason.startswith("PERMANENT_"):
                outcomes.append(LeaseLost(f"the lease of message {message.id} of {self.name} has ended: {reason}"))
            else:
                outcomes.append(Transient(f"message {message.id} of {self.name}: {reason}"))
        return outcomes

    async def _let_go(self, messages: Sequence[Message]) -> None:
        # What cannot be let go comes back when its lease ends; nobody is left to tell.
        await self.set_lease(messages, 0)

    async def backlog(self) -> Backlog:
        """See `rejoinder.adapters.driver.Subscription.backlog`. Only finds out whether the subscription is there."""
        await self._describe()
        return Backlog(waiting=None, held=None)

    async def close(self) -> None:
        """Hand back what pulls that nobody waits for still bring."""
        await self._pulls.close()


def _attributes(given: Mapping[str, str]) -> Mapping[str, str]:
    if not given:
        return NO_ATTRIBUTES
    attributes = dict(given)
    if GOOGLE_TRACE in attributes and TRACE not in attributes:
        attributes[TRACE] = attributes[GOOGLE_TRACE]
    return MappingProxyType(attributes)


def _parts(messages: Sequence[Message]) -> list[Sequence[Message]]:
    """Cut into requests that the service takes."""
    parts: list[Sequence[Message]] = []
    start = size = 0
    for number, message in enumerate(messages):
        length = len(cast("str", message.lease)) + 4
        if number - start == SETTLE_IDS or (number > start and size + length > SETTLE_BYTES):
            parts.append(messages[start:number])
            start, size = number, 0
        size += length
    if messages:
        parts.append(messages[start:])
    return parts
