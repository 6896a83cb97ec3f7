"""From a message to what it asks for, wherever that is: in the message, at a location, or in an S3 event."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

from rejoinder.adapters import Message
from rejoinder.schemas.envelope import ParsedRequest
from rejoinder.schemas.wire import WireError
from rejoinder.worker.errors import BadRequest, RequestError, TimedOut
from rejoinder.worker.handler import Answer, Answered, Handler, Job, failed, refusal, response_id
from rejoinder.worker.inputs import Inputs

Read = TypeVar("Read")

Events = Callable[[bytes], Sequence[ParsedRequest | WireError | None] | None]
"""The requests that a message without an envelope is, or what is wrong with them, or None for one that is ignored; None
for the whole if it is something else."""


Stops = Callable[[Message, Job], AbstractContextManager[object]]
"""Whose block, in which a request is read or run, the request's sender may end: it raises Cancelled then."""


def never_stops(_message: Message, _job: Job) -> AbstractContextManager[object]:
    """Of a worker to which nobody can say that a request is not wanted any more."""
    return _UNSTOPPED


_UNSTOPPED = nullcontext()


@dataclass(frozen=True, slots=True)
class Part:
    """One of several requests that a message is."""

    request: ParsedRequest | WireError
    name: str
    """Its response id."""


@dataclass(frozen=True, slots=True)
class Several:
    """A message of several requests, each of which is accepted by itself."""

    parts: tuple[Part, ...]


class Acceptor:
    """Accepts messages, and reads what they name by location.

    Args:
        handler: Reads and checks requests.
        subscription: The subscription's name: half of what names an answer.
        inputs: Reads objects.
        events: Reads messages without an envelope.
        stops: What may end the reading of an input.
    """

    def __init__(
        self, handler: Handler, *, subscription: str, inputs: Inputs, events: Events, stops: Stops = never_stops
    ) -> None:
        self._handler = handler
        self._subscription = subscription
        self._inputs = inputs
        self._events = events
        self._stops = stops

    @property
    def held_bytes(self) -> int:
        """What the objects that were read have of the memory."""
        return self._inputs.room.used

    async def accept(self, message: Message, latest: float) -> Job | Several | Answered:
        """Read and check a message: a job to run, or the answer if there is nothing to run. Never raises.

        Args:
            message: What was received.
            latest: The loop's time by which all of it must have been read.
        """
        if message.stored_at is not None:
            return await self._pointed(message, message.stored_at, latest)
        accepted = await self._handler.accept(message)
        if isinstance(accepted, Job):
            return accepted if accepted.input_location is None else await self._filled(message, accepted, latest)
        return self._event(message, accepted)

    async def accept_part(self, message: Message, part: Part, latest: float) -> Job | Answered:
        """The same for one of several requests that a message is."""
        if isinstance(part.request, WireError):
            error = BadRequest(str(part.request), param=part.request.param)
            return Answered(refusal(error, None, part.name), None)
        job = self._handler.job(message, part.request, part.name)
        return await self._filled(message, job, latest) if isinstance(job, Job) else Answered(job, None)

    def _event(self, message: Message, refused: Answer) -> Several | Answered:
        """What a refused message is after all, if it is an event: it has no metadata then."""
        whole = refused.metadata is None and len(message.body) <= self._handler.max_request_bytes
        requests = self._events(message.body) if whole else None
        if requests is None:
            return Answered(refused, None)
        names = [response_id(self._subscription, f"{message.id}\0{place}", None) for place in range(len(requests))]
        parts = tuple(Part(asked, name) for asked, name in zip(requests, names, strict=True) if asked is not None)
        return Several(parts) if parts else Answered(Answer(204, None, None, "", silent=True), None)

    async def _pointed(self, message: Message, location: str, latest: float) -> Job | Several | Answered:
        """Accept a message that is only a pointer to its body."""
        name = response_id(self._subscription, message.id, None)
        share = self._inputs.room.share()
        accepted: Job | Several | Answered | None = None
        try:
            body = await _read(self._inputs.pointed(location, self._handler.max_request_bytes, share), latest, name)
            whole = replace(message, body=body, stored_at=None)
            asked = await self._handler.accept(whole)
            if not isinstance(asked, Job):
                accepted = self._event(whole, asked)
            elif asked.input_location is None:
                accepted = replace(asked, share=share)
            else:
                accepted = await self._filled(message, replace(asked, share=share), latest)
        except RequestError as exc:
            accepted = Answered(refusal(exc, None, name), None)
        finally:
            if not isinstance(accepted, Job):
                share.free()
        return accepted

    async def _filled(self, message: Message, job: Job, latest: float) -> Job | Answered:
        """The same job, with the body that its input is."""
        share = job.share or self._inputs.room.share()
        filled: Job | None = None
        try:
            with self._stops(message, job):
                reading = self._inputs.body(job.input_location or "", job.options.content_type, share)
                filled = replace(job, body=await _read(reading, latest, job.response_id), share=share)
        except RequestError as exc:
            return Answered(refusal(exc, job.metadata, job.response_id), job)
        finally:
            if filled is None:
                share.free()
        return filled


async def _read(reading: Awaitable[Read], latest: float, name: str) -> Read:
    """Await the reading of an object until `latest`, on the loop's clock. Raises RequestError, and nothing else."""
    timer = asyncio.timeout_at(latest)
    try:
        async with timer:
            return await reading
    except RequestError:
        raise
    except Exception as exc:
        if isinstance(exc, TimeoutError) and timer.expired():
            raise TimedOut("the request was held for as long as the worker may hold it") from exc
        raise failed(exc, name) from exc
