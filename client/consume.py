"""Receive responses, each acked when it has been dealt with.

async with aclosing(responses("sqlite:///work.db?queue=responses", count=10)) as incoming:
    async for response in incoming:
        save(response.read().metadata, response.body)
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from pydantic import ValidationError

from rejoinder.adapters import AdapterError, LeaseLost, Message, Subscription, Transient, open_subscription
from rejoinder.client.patience import patiently, to_its_end
from rejoinder.client.stored import BodyOf, open_bodies
from rejoinder.schemas.envelope import Response

BATCH = 256
"""Responses leased at once, which share a round trip and an ack."""
BATCH_BYTES = 8 << 20
"""Where one receive brings more than this, several at once would hold too much."""
POLL_SECONDS = 5.0
"""Of one receive. A stop need not wait for its end, since it cancels the call."""
RENEW_AT = 1 / 3
"""Of a lease, past which what is still held is renewed before the next response is given."""
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""A half of a character outside the basic plane, as JSON escapes it."""


@dataclass(frozen=True, slots=True)
class Received:
    """One delivery of one response."""

    id: str
    """The broker's id of the response's message: a redelivery has the same."""
    body: bytes
    """The response's JSON."""
    attributes: Mapping[str, str]
    """What the worker put beside it: `request_message_id`, `response_id`, `attempt`."""

    def read(self) -> Response:
        """The response, validated.

        Raises:
            pydantic.ValidationError: it is not one.
        """
        return read_response(self.body)


def read_response(body: bytes) -> Response:
    """A response, validated. Raises pydantic.ValidationError where it is none."""
    try:
        return Response.model_validate_json(body)
    except ValidationError:
        # Its parser and its strings have no lone surrogates, which JSON may have: half of a character, cut in two.
        if not SURROGATE.search(body):
            raise
        try:
            values = json.loads(body.decode())
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict) or not isinstance(values.get("metadata"), dict | None):
            raise
        own = {key: values.pop(key) for key in ("metadata", "body") if key in values}
        return Response.model_validate(values | dict.fromkeys(own)).model_copy(update=own)


async def responses(
    url: str,
    *,
    count: int | None = None,
    idle: float | None = None,
    until: Callable[[], bool] = lambda: False,
    blobs: str | None = None,
) -> AsyncGenerator[Received, None]:
    """Receive responses one by one; asking for the next one settles those before it.

    One on which the caller broke off (`break`, an exception) is not acked: it comes again, and so does one on which
    the caller spent more than a lease. At least once, so a consumer bears seeing a response twice. Close the
    generator (`contextlib.aclosing`) where it may be left early, so that what it holds is let go at once.

    Args:
        url: As `rejoinder.adapters.open_subscription` takes it.
        count: End after this many. Default: never.
        idle: End when this many seconds pass without a response. Default: never.
        until: Asked when the next one is asked for, whether to end; those before it are acked then.
        blobs: The store that responses which are pointers (`Message.stored_at`) may be read from. Default: none is.

    Raises:
        AdapterError: the broker says so, or a stored response cannot be read (`NotRead`), which stays in the queue.
    """
    left = count
    async with _opened(url, blobs) as (subscription, body_of):
        source = _Source(subscription, idle)
        while (left is None or left > 0) and not until() and (messages := await source.take(left)):
            held = messages[::-1]
            handled: list[Message] = []
            leased = time.monotonic()
            try:
                while held:
                    if time.monotonic() > leased + RENEW_AT * subscription.lease_seconds:
                        leased = time.monotonic()
                        held = await source.renew(held)
                        if not held:
                            break
                    yield await _received(held[-1], body_of)
                    handled.append(held.pop())
                    if until():
                        break
            finally:
                await source.ack(handled)
                await source.let_go(held)
            left = None if left is None else left - len(handled)


async def batches(
    url: str, *, idle: float | None = None, until: Callable[[], bool] = lambda: False, blobs: str | None = None
) -> AsyncGenerator[list[Received], None]:
    """Receive responses as `responses` does, several at once: asking for the next batch acks the one before.

    For those to whom making a batch durable costs as much as one response: a file's fsync, a database's commit.

    Args:
        url: As `rejoinder.adapters.open_subscription` takes it.
        idle: End when this many seconds pass without a response. Default: never.
        until: Asked after what one receive brought, when all of it is acked, whether to end.
        blobs: As `responses` has it. A stored response is a batch by itself, since it may be large.
    """
    async with _opened(url, blobs) as (subscription, body_of):
        source = _Source(subscription, idle)
        while not until() and (messages := await source.take(None)):
            held = messages
            leased = time.monotonic()
            try:
                while held:
                    if time.monotonic() > leased + RENEW_AT * subscription.lease_seconds:
                        leased = time.monotonic()
                        held = await source.renew(held)
                        continue
                    batch = held[: _together(held)]
                    yield [await _received(message, body_of) for message in batch]
                    held = held[len(batch) :]
                    await source.ack(batch)
            finally:
                await source.let_go(held)


@asynccontextmanager
async def _opened(url: str, blobs: str | None) -> AsyncIterator[tuple[Subscription, BodyOf]]:
    async with AsyncExitStack() as stack:
        body_of = await patiently(lambda: stack.enter_async_context(open_bodies(blobs)))
        yield await patiently(lambda: stack.enter_async_context(open_subscription(url))), body_of


async def _received(message: Message, body_of: BodyOf) -> Received:
    body = message.body if message.stored_at is None else await body_of(message)
    return Received(message.id, body, message.attributes)


def _together(held: Sequence[Message]) -> int:
    """How many of `held` make the next batch: those before the next one that is stored, or that one."""
    before = next((place for place, message in enumerate(held) if message.stored_at is not None), len(held))
    return before or 1


class _Source:
    """One subscription as a patient consumer uses it."""

    def __init__(self, subscription: Subscription, idle: float | None) -> None:
        self._subscription = subscription
        self._idle = idle
        self._beside = 0

    async def take(self, left: int | None) -> list[Message]:
        """Lease some, at most `left`; none when `idle` has passed without any."""
        limit = BATCH if left is None else min(BATCH, left)
        end = None if self._idle is None else time.monotonic() + self._idle
        while True:
            wait = POLL_SECONDS if end is None else min(POLL_SECONDS, max(0.0, end - time.monotonic()))
            messages = await patiently(partial(self._subscription.receive, limit, wait))
            if messages or (end is not None and time.monotonic() >= end):
                return messages + await self._beside_these(messages, limit - len(messages))

    async def _beside_these(self, messages: Sequence[Message], left: int) -> list[Message]:
        """Lease up to `left` more in several receives at once, where one brings few: they share the ack's round trip.

        Each time that all of them come back full, the next time has twice as many.
        """
        most = self._subscription.max_receive
        if len(messages) < most or sum(len(message.body) for message in messages) > BATCH_BYTES:
            self._beside = 0
            return []
        shares = [min(most, left - taken) for taken in range(0, left, most)][: self._beside]
        calls = [asyncio.create_task(self._subscription.receive(share, 0)) for share in shares]
        more: list[Message] = []
        try:
            # An error is nobody's: the next receive meets its own.
            results = await asyncio.gather(*calls, return_exceptions=True)
        except asyncio.CancelledError:
            results = await asyncio.gather(*calls, return_exceptions=True)  # these are cancelled too, if not done
            more = [message for result in results if isinstance(result, list) for message in result]
            await self.let_go([*messages, *more])
            raise
        for result in results:
            if isinstance(result, list):
                more += result
            elif not isinstance(result, AdapterError):
                raise result
        self._beside = 2 * self._beside + 1 if len(more) == sum(shares) else 0
        return more

    async def ack(self, messages: Sequence[Message]) -> None:
        """Ack. What could not be acked for now comes again, as at-least-once allows.

        Raises:
            AdapterError: what will not get better: without acks the same responses would come for ever.
        """
        if not messages:
            return
        for outcome in await to_its_end(patiently(partial(self._subscription.ack, messages))):
            if outcome is not None and not isinstance(outcome, LeaseLost | Transient):
                raise outcome

    async def renew(self, held: Sequence[Message]) -> list[Message]:
        """Renew the leases; return those that are still ours."""
        lease = self._subscription.lease_seconds
        outcomes = await patiently(partial(self._subscription.set_lease, held, lease))
        return [message for message, outcome in zip(held, outcomes, strict=True) if outcome is None]

    async def let_go(self, held: Sequence[Message]) -> None:
        """Make them available to others at once."""
        if held:
            await self._subscription.set_lease(held, 0)
