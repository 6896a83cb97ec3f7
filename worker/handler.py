"""From a message to an answer: parse, check, run. Decides no retry and settles nothing."""

import asyncio
import hashlib
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import structlog

from rejoinder.adapters import Message
from rejoinder.schemas.envelope import Options, ParsedRequest, parse_request
from rejoinder.schemas.errors import ErrorBody
from rejoinder.schemas.wire import WireError, peek_metadata
from rejoinder.worker.engines.protocol import Engine, EngineRequest
from rejoinder.worker.errors import (
    BadRequest,
    EngineGone,
    Expired,
    Failed,
    Missing,
    RequestError,
    RequestTooLarge,
    RetryableError,
    TimedOut,
    Unavailable,
)
from rejoinder.worker.inputs import Inputs
from rejoinder.worker.limits import Limits
from rejoinder.worker.logs import places
from rejoinder.worker.room import Share
from rejoinder.worker.stores import Stores

log = structlog.get_logger(__name__)

# Parsing holds the GIL for most of its time, so a thread is no cure; but between its parts it lets the event loop in.
PARSE_IN_THREAD_BYTES = 256 * 1024
NO_OPTIONS = Options()

Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the sender gets for one request."""

    status_code: int
    metadata: str | None
    """The text of the request's metadata; None where it could not be read."""
    body: Any
    response_id: str
    error: RequestError | None = None
    """What went wrong, where something did."""
    named_by_message: bool = False
    """`response_id` is known to be the message's own, not an `inference_id`."""
    output_location: str | None = None
    """Where the result was stored while it was made; `body` is None then."""
    also: tuple["Answer", ...] = ()
    """The answers to further requests of the same message. If any answer of it is retryable, this one is."""
    silent: bool = False
    """There is nothing to answer: the message is settled without a response."""

    @property
    def retryable(self) -> bool:
        """Whether another attempt may do better."""
        return isinstance(self.error, RetryableError)


@dataclass(frozen=True, slots=True)
class Job:
    """A request that can be started."""

    path: str
    body: Any
    response_id: str
    created: int
    """See `EngineRequest.created`."""
    attempt: int | None
    metadata: str
    options: Options
    expires_at: float = math.inf
    """Epoch seconds after which it must not be started; infinity: never."""
    expiry_reason: str = ""
    input_location: str | None = None
    """Where the body came from."""
    share: Share | None = None
    """What such a body has of the room for inputs. Whoever has the job frees it."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of several requests that a message is."""

    request: ParsedRequest | WireError
    """WireError: what is wrong with it."""
    name: str
    """Its response id."""


@dataclass(frozen=True, slots=True)
class Several:
    """A message of several requests, each of which is accepted by itself."""

    parts: tuple[Part, ...]


Events = Callable[[bytes], Sequence[ParsedRequest | WireError] | None]
"""The requests that a message without an envelope is: none if it is to be ignored; None if it is something else."""


def response_id(subscription: str, message_id: str, inference_id: str | None) -> str:
    """What names the answer of a request: the same on every delivery of its message.

    Derived, not random, so that a redelivery to another worker has it too.
    """
    if inference_id is not None:
        return inference_id
    return hashlib.sha256(f"{subscription}\0{message_id}".encode()).hexdigest()[:32]


class Handler:
    """Runs requests on one engine.

    Args:
        engine: A started engine.
        subscription: The subscription's name: half of what names an answer.
        default_path: The path of a request that has none.
        max_request_bytes: A larger request is answered 413.
        invocation_timeout: Seconds of inference where the request sets no limit.
        inputs: Reads what is named by location. Default: none may be read.
        events: The requests that a message without an envelope is; None if it is none of these. Default: none is.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        subscription: str,
        default_path: str,
        max_request_bytes: int,
        invocation_timeout: float,
        inputs: Inputs | None = None,
        events: Events | None = None,
    ) -> None:
        self._engine = engine
        self._subscription = subscription
        self._default_path = default_path
        self._max_request_bytes = max_request_bytes
        self._invocation_timeout = invocation_timeout
        self._inputs = inputs or Inputs(Stores(), 0)
        self._events = events
        self._clock = asyncio.get_running_loop().time
        self._limits = Limits()

    @property
    def held_bytes(self) -> int:
        """What the inputs that were read by location have of the memory."""
        return self._inputs.room.used

    async def accept(
        self, message: Message, latest: float | None = None, share: Share | None = None
    ) -> Job | Several | Answer:
        """Read and check a message: a job to run, or the answer if there is nothing to run. Never raises.

        Args:
            message: What was received.
            latest: The loop's time by which an input must have been read; None: whenever.
            share: What the message's body has of the room for inputs, where it has any.
        """
        name = response_id(self._subscription, message.id, None)
        if message.stored_at is not None:
            return await self._pointed(message, message.stored_at, name, latest)
        try:
            if len(message.body) > self._max_request_bytes:
                return self._too_large(message, name)
            if len(message.body) > PARSE_IN_THREAD_BYTES:
                parsed = await asyncio.to_thread(parse_request, message.body)
            else:
                parsed = parse_request(message.body)
        except WireError as exc:
            return self._several(message) or refusal(BadRequest(str(exc), param=exc.param), exc.metadata, name)
        except Exception as exc:  # noqa: BLE001 - a fault of ours in reading one message must not touch the others
            return refusal(failed(exc, name), None, name)
        options = parsed.options or NO_OPTIONS
        name = options.inference_id or name
        try:
            job = self._job(message, parsed, options, name)
        except RequestError as exc:
            return refusal(exc, parsed.metadata, name)
        if job.input_location is not None:
            return await self._with_input(job, job.input_location, latest, share or self._inputs.room.share())
        return job if share is None else replace(job, share=share)

    async def accept_part(self, message: Message, part: Part, latest: float) -> Job | Answer:
        """The same for one of several requests that a message is."""
        try:
            if isinstance(part.request, WireError):
                raise BadRequest(str(part.request), param=part.request.param)
            job = self._job(message, part.request, NO_OPTIONS, part.name)
        except RequestError as exc:
            return refusal(exc, None if isinstance(part.request, WireError) else part.request.metadata, part.name)
        location = part.request.input_location or ""
        return await self._with_input(job, location, latest, self._inputs.room.share())

    def _several(self, message: Message) -> Several | Answer | None:
        """What a message without an envelope may be, where S3 events are requests."""
        requests = None if self._events is None else self._events(message.body)
        if requests is None:
            return None
        names = (response_id(self._subscription, f"{message.id}\0{place}", None) for place in range(len(requests)))
        parts = tuple(map(Part, requests, names))
        return Several(parts) if parts else Answer(204, None, None, "", silent=True)

    async def _pointed(
        self, message: Message, location: str, name: str, latest: float | None
    ) -> Job | Several | Answer:
        """Accept a message that is only a pointer to the request."""
        share = self._inputs.room.share()
        accepted: Job | Several | Answer | None = None
        try:
            reading = self._inputs.envelope(location, self._max_request_bytes, share)
            body = await _read(reading, latest, name)
            accepted = await self.accept(replace(message, body=body, stored_at=None), latest, share)
        except RequestError as exc:
            accepted = refusal(exc, None, name)
        finally:
            if not isinstance(accepted, Job):
                share.free()
        return accepted

    async def _with_input(self, job: Job, location: str, latest: float | None, share: Share) -> Job | Answer:
        """The same job, with the body that its input is."""
        read = False
        try:
            reading = self._inputs.body(location, job.options.content_type, share)
            body = await _read(reading, latest, job.response_id)
            read = True
            return replace(job, body=body, share=share)
        except RequestError as exc:
            return refusal(exc, job.metadata, job.response_id)
        finally:
            if not read:
                share.free()

    def _too_large(self, message: Message, name: str) -> Answer:
        # Not parsed: reading all of it is what the limit is there to avoid.
        limit = self._max_request_bytes
        error = RequestTooLarge(f"the request has {len(message.body)} bytes; at most {limit} are allowed")
        return refusal(error, peek_metadata(message.body, limit), name)

    def _job(self, message: Message, parsed: ParsedRequest, options: Options, name: str) -> Job:
        path = self._default_path if parsed.path is None else "/" + parsed.path.removeprefix("/")
        if path not in self._engine.paths:
            raise Missing(
                f"unknown path {path!r}; this worker serves {', '.join(sorted(self._engine.paths))}", param="path"
            )
        expires_at, reason = _expiry(options, message.sent_at)
        created = int(message.sent_at or 0)
        metadata, location = parsed.metadata, parsed.input_location
        job = Job(
            path, parsed.body, name, created, message.attempt, metadata, options, expires_at, reason, location
        )
        check_expiry(job)
        return job

    async def run(self, job: Job, latest: float, on_wait: Callable[[bool], None] | None = None) -> Answer:
        """Run a job to its answer; an error is an answer too.

        Args:
            job: What `accept` returned.
            latest: The loop's time by which it must have ended, whatever its own timeout.
            on_wait: Called with True when the engine lets it wait for others' sake, and with False when it goes on.

        Raises:
            EngineGone: the engine will not come back; nothing is known of the request.
        """
        name, clock = job.response_id, self._clock
        limit = float(job.options.invocation_timeout_seconds or self._invocation_timeout)
        timer = self._limits.at(min(clock() + limit, latest))

        def waits(waiting: bool) -> None:
            timer.when = latest if waiting else min(clock() + limit, latest)
            if on_wait is not None:
                on_wait(waiting)

        try:
            check_expiry(job)
            request = EngineRequest(job.path, job.body, name, job.created, job.attempt, waits)
            with timer:
                body = await self._engine.generate(request)
        except TimeoutError as exc:
            if not timer.expired:  # not ours: something inside the engine timed out
                return refusal(failed(exc, name), job.metadata, name)
            reason = f"inference took longer than invocation_timeout_seconds, {limit:g} s"
            held = timer.when == latest
            error = TimedOut("the request was held for as long as the worker may hold it" if held else reason)
            return refusal(error, job.metadata, name)
        except RequestError as exc:
            return refusal(exc, job.metadata, name)
        except EngineGone:
            raise
        except Exception as exc:  # noqa: BLE001 - an engine's bug is this request's error, not the worker's end
            return refusal(failed(exc, name), job.metadata, name)
        return Answer(200, job.metadata, body, name, named_by_message=job.options.inference_id is None)


def refusal(error: RequestError, metadata: str | None, name: str) -> Answer:
    """The answer that carries an error."""
    return Answer(error.status_code, metadata, ErrorBody.of(error.detail()), name, error)


async def _read(reading: Awaitable[Read], latest: float | None, name: str) -> Read:
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


def exhausted(attempts: int, metadata: str | None, name: str) -> Answer:
    """The answer to a request of which no delivery was seen to end: the worker or its lease ended each time."""
    error = Unavailable(f"given up after {attempts} deliveries: each time its worker or its lease was lost")
    return refusal(error, metadata, name)


def failed(exc: Exception, name: str) -> Failed:
    """The error of a request on which we, or the engine, failed in a way that nobody foresaw."""
    # The message of an unforeseen exception may quote the prompt, so it is logged by type and place only.
    log.error("engine_error", response_id=name, error_type=type(exc).__name__, where=places(exc))
    return Failed(f"the engine failed on this request: {type(exc).__name__}")


def _expiry(options: Options, sent_at: float | None) -> tuple[float, str]:
    if options.deadline is None and options.request_ttl_seconds is None:
        return float("inf"), ""
    candidates = [(float("inf"), "")]
    if options.deadline is not None:
        candidates.append((options.deadline.timestamp(), f"its deadline {options.deadline.isoformat()} has passed"))
    if options.request_ttl_seconds is not None and sent_at is not None:
        reason = f"its request_ttl_seconds, {options.request_ttl_seconds}, have passed since it was sent"
        candidates.append((sent_at + options.request_ttl_seconds, reason))
    return min(candidates)


def check_expiry(job: Job) -> None:
    """Raise Expired for a job that must not be started any more."""
    now = time.time()
    if now >= job.expires_at:
        at = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
        raise Expired(f"the request expired before it was started: {job.expiry_reason} (it is {at})")
