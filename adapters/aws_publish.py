"""Publishing to SQS and SNS: batches of at most 10 entries, and messages of one group never overtaking each other."""

import asyncio
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from rejoinder.adapters import aws_errors, aws_wire
from rejoinder.adapters.driver import Outgoing
from rejoinder.adapters.errors import AdapterError, TooLarge, Transient

ENTRIES: Final = 10

Outcome = str | AdapterError
Send = Callable[[list[dict[str, Any]]], Awaitable[Mapping[str, Outcome]]]


@dataclass(frozen=True, slots=True)
class Entry:
    """One message, ready to be sent."""

    index: int
    """Its place in the batch that was given to `publish`."""
    group: str | None
    """The group whose order is to be kept; None on standard queues and topics."""
    size: int
    request: dict[str, Any]


def entry(index: int, outgoing: Outgoing, *, body_field: str, fifo: bool) -> Entry:
    """Make the entry of `outgoing`, whose body goes into `body_field`.

    Raises:
        ValueError: SQS and SNS cannot carry it; names what.
    """
    if outgoing.stored_at is None:
        body, coded = aws_wire.encode_body(outgoing.body)
    else:
        body, coded = aws_wire.encode_pointer(outgoing), False
    attributes = aws_wire.encode_attributes(outgoing, coded=coded)
    request: dict[str, Any] = {body_field: body}
    if attributes:
        request["MessageAttributes"] = attributes
    group = None if outgoing.ordering_key is None else aws_wire.check_group(outgoing.ordering_key)
    if fifo:
        identity = _deduplication(outgoing.deduplication_id)
        group = group or identity
        request["MessageDeduplicationId"] = identity
    if group is not None:
        request["MessageGroupId"] = group
    return Entry(index, group if fifo else None, aws_wire.size(body, attributes), request)


def _deduplication(given: str | None) -> str:
    """Return what the broker takes for `given`: itself where it can be, else its hash; something new for None."""
    if given is None:
        return uuid.uuid4().hex
    try:
        return aws_wire.check_group(given)
    except ValueError:
        return sha256(given.encode(errors="surrogatepass")).hexdigest()


async def told(call: Awaitable[Mapping[str, Any]], permission: str, resource: str) -> dict[str, Outcome]:
    """Return what the answer of one batch call says of each entry, by its Id. KeyError where it is garbled."""
    answer = await call
    outcomes: dict[str, Outcome] = {one["Id"]: one["MessageId"] for one in answer.get("Successful", ())}
    return outcomes | {one["Id"]: aws_errors.from_entry(one, permission, resource) for one in answer.get("Failed", ())}


async def publish(
    entries: Sequence[Entry],
    *,
    max_message: int,
    max_batch: int,
    send: Send,
) -> list[Outcome]:
    """Send `entries` in batches, several at once, and return the outcome of each.

    Args:
        entries: in the order of publishing.
        max_message: bytes of one message, attributes included.
        max_batch: bytes of one batch.
        send: makes one batch call and returns what it `told`; raises AdapterError where it fails as a whole.
    """
    outcomes: list[Outcome] = [Transient("not sent")] * len(entries)
    fits = []
    for one in entries:
        if one.size > max_message:
            outcomes[one.index] = TooLarge(
                f"the message has {one.size} bytes as it is sent, attributes included; {max_message} are allowed"
            )
        else:
            fits.append(one)
    lanes = _lanes(fits)
    if len(lanes) == 1:
        await _run(lanes[0], max_batch, send, outcomes)
    else:
        await asyncio.gather(*(_run(lane, max_batch, send, outcomes) for lane in lanes))
    return outcomes


async def _run(lane: Sequence[Entry], max_batch: int, send: Send, outcomes: list[Outcome]) -> None:
    """Send one lane, batch after batch, and note the outcomes."""
    broken: set[str] = set()
    chunks = deque(_chunks(lane, max_batch))
    while chunks:
        live: list[Entry] = []
        for one in chunks.popleft():
            if one.group in broken:
                # A message whose predecessor failed would overtake it when that one is published again.
                outcomes[one.index] = Transient(f"an earlier message of group {one.group!r} failed")
            else:
                live.append(one)
        if not live:
            continue
        try:
            found = await send([{"Id": str(place), **one.request} for place, one in enumerate(live)])
        except AdapterError as exc:
            if isinstance(exc, TooLarge) and len(live) > 1:
                # Too large together, where a region's or an emulator's limit is lower: each may fit by itself.
                half = len(live) // 2
                chunks.extendleft((live[half:], live[:half]))
                continue
            found = {str(place): exc for place in range(len(live))}
        for place, one in enumerate(live):
            outcome = found.get(str(place)) or Transient("the broker's answer does not tell of this message")
            outcomes[one.index] = outcome
            if one.group is not None and not isinstance(outcome, str):
                broken.add(one.group)


def _lanes(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Divide `entries` into what can be sent at the same time: no group is in two lanes."""
    lanes: list[list[Entry]] = []
    lane_of: dict[str, list[Entry]] = {}
    for one in entries:
        lane = None if one.group is None else lane_of.get(one.group)
        if lane is None:
            if not lanes or len(lanes[-1]) >= ENTRIES:
                lanes.append([])
            lane = lanes[-1]
            if one.group is not None:
                lane_of[one.group] = lane
        lane.append(one)
    return lanes


def _chunks(lane: Sequence[Entry], max_batch: int) -> list[list[Entry]]:
    chunks: list[list[Entry]] = []
    room = 0
    for one in lane:
        if not chunks or len(chunks[-1]) == ENTRIES or one.size > room:
            chunks.append([])
            room = max_batch
        chunks[-1].append(one)
        room -= one.size
    return chunks
