"""What `rejoinder.client.streams` tells of the responses that come."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from rejoinder.client.consume import Received
from rejoinder.schemas.envelope import Response


class Name(NamedTuple):
    """What a stream's messages have in common, and those of no other request."""

    response_id: str
    request_message_id: str


@dataclass(frozen=True, slots=True)
class Chunks:
    """The next chunks of an attempt; the first ones begin it."""

    name: Name
    metadata: dict[str, Any] | None
    attempt: int
    chunks: list[Any]


@dataclass(frozen=True, slots=True)
class Restarted:
    """Another attempt replaces the one whose chunks were given: forget those, its own follow from the first on."""

    name: Name
    metadata: dict[str, Any] | None
    attempt: int


@dataclass(frozen=True, slots=True)
class Answered:
    """A request has its answer. Nothing more comes of it."""

    name: Name
    metadata: dict[str, Any] | None
    attempt: int | None
    """None: it was no stream."""
    response: Response
    """One response, without `stream`: of a success the body is what all chunks are together (`schemas.assembly`)."""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Too much was held, and this heard nothing for longest: what was given of it has no end, unless it begins anew."""

    name: Name
    attempt: int


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message that is not a response. `reason` is one sentence."""

    received: Received
    reason: str


Event = Chunks | Restarted | Answered | Forgotten | Unreadable
