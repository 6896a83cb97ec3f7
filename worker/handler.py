"""From a message to an answer: parse, check, run. Decides no retry and settles nothing."""

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import structlog

from rejoinder.adapters import Message
from rejoinder.schemas.envelope import Options, ParsedRequest, parse_request
from rejoinder.schemas.errors import ErrorBody
from rejoinder.schemas.wire import WireError, peek_metadata
from rejoinder.worker.engines.protocol import Engine, EngineRequest, WithHeaders
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
from rejoinder.worker.limits import Limits
from rejoinder.worker.logs import places
from rejoinder.worker.room import Share

log = structlog.get_logger(__name__)

# Parsing holds the GIL for most of its time, so a thread is no cure; but between its parts it lets the event loop in.
PARSE_IN_THREAD_BYTES = 256 * 1024
NO_OPTIONS = Options()
HEADERS = (
    ("Content-Type", "content_type"),
    ("Accept", "accept"),
    ("X-Amzn-SageMaker-Custom-Attributes", "custom_attributes"),
)
"""What HTTP calls some options."""


Source = Literal["", "object", "ledger"]
"""Where an answer was found: "" where it is new."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What is stored of an answer."""

    wire: bytes
    """The response's bytes, which are published as they are."""
    output_location: str | None = None
    failure_location: str | None = None
    source: Source = ""
    pointer: str | None = None
    """Where the response itself is stored, if only a pointer to it is published."""


@dataclass(slots=True)  # not frozen: making one would take three times as long
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
    kept: Kept | None = None
    """What is stored of it, where the worker has stores."""
    also: tuple["Answered", ...] = ()
    """The answers to further requests of the same message. If any answer of it is retryable, this one is."""
    silent: bool = False
    """There is nothing to answer: the message is settled without a response."""
    headers: Mapping[str, str] | None = None
    """Those that the engine gave with the body."""
    stream: Mapping[str, Any] | None = None
    """Of a stream's last message, the fields of its `rejoinder.schemas.envelope.Stream`."""

    @property
    def retryable(self) -> bool:
        """Whether another attempt may do better."""
        return isinstance(self.error, RetryableError)


@dataclass(slots=True)  # not frozen: making one would take three times as long
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
class Answered:
    """One of several requests of a message, and its answer."""

    answer: Answer
    job: Job | None
    """None where it could not be started."""


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
    """

    def __init__(
        self,
        engine: Engine,
        *,
        subscription: str,
        default_path: str,
        max_request_bytes: int,
        invocation_timeout: float,
    ) -> None:
        self._engine = engine
        self._subscription = subscription
        self._default_path = default_path
        self.max_request_bytes = max_request_bytes
        self._invocation_timeout = invocation_timeout
        self._clock = asyncio.get_running_loop().time
        self._limits = Limits()

    async def accept(self, message: Message) -> Job | Answer:
        """Read and check a message: a job to run, or the answer if there is nothing to run. Never raises.

        A job with an `input_location` has no body yet.
        """
        name = response_id(self._subscription, message.id, None)
        try:
            if len(message.body) > self.max_request_bytes:
                return self._too_large(message, name)
            if len(message.body) > PARSE_IN_THREAD_BYTES:
                parsed = await asyncio.to_thread(parse_request, message.body)
            else:
                parsed = parse_request(message.body)
        except WireError as exc:
            return refusal(BadRequest(str(exc), param=exc.param), exc.metadata, name)
        except Exception as exc:  # noqa: BLE001 - a fault of ours in reading one message must not touch the others
            return refusal(failed(exc, name), None, name)
        return self.job(message, parsed, (parsed.options or NO_OPTIONS).inference_id or name)

    def _too_large(self, message: Message, name: str) -> Answer:
        # Not parsed: reading all of it is what the limit is there to avoid.
        limit = self.max_request_bytes
        error = RequestTooLarge(f"the request has {len(message.body)} bytes; at most {limit} are allowed")
        return refusal(error, peek_metadata(message.body, limit), name)

    def job(self, message: Message, parsed: ParsedRequest, name: str) -> Job | Answer:
        """The job that a request is, or the answer if it must not be run.

        Args:
            message: What it came with.
            parsed: The request.
            name: Its response id.
        """
        try:
            return self._job(message, parsed, name)
        except RequestError as exc:
            return refusal(exc, parsed.metadata, name)

    def _job(self, message: Message, parsed: ParsedRequest, name: str) -> Job:
        options = parsed.options or NO_OPTIONS
        path = self._default_path if parsed.path is None else "/" + parsed.path.removeprefix("/")
        if path not in self._engine.paths:
            raise Missing(
                f"unknown path {path!r}; this worker serves {', '.join(sorted(self._engine.paths))}", param="path"
            )
        expires_at, reason = _expiry(options, message.sent_at)
        created = int(message.sent_at or 0)
        metadata, location = parsed.metadata, parsed.input_location
        job = Job(path, parsed.body, name, created, message.attempt, metadata, options, expires_at, reason, location)
        check_expiry(job)
        return job

    async def run(
        self,
        job: Job,
        latest: float,
        on_wait: Callable[[bool], None] | None = None,
        begin: Callable[[Callable[[], None]], Callable[[Any], None]] | None = None,
    ) -> Answer:
        """Run a job to its answer; an error is an answer too.

        Args:
            job: What `accept` returned.
            latest: The loop's time by which it must have ended, whatever its own timeout.
            on_wait: Called with True when the engine lets it wait for others' sake, and with False when it goes on.
            begin: Where a stream is asked for: given what ends the engine's work, it returns what takes the chunks.

        Raises:
            EngineGone: the engine will not come back; nothing is known of the request.
        """
        name, clock = job.response_id, self._clock
        limit = float(job.options.invocation_timeout_seconds or self._invocation_timeout)
        timer = self._limits.at(min(clock() + limit, latest))

        def waits(waiting: bool) -> None:
            timer.reschedule(latest if waiting else min(clock() + limit, latest))
            if on_wait is not None:
                on_wait(waiting)

        try:
            check_expiry(job)
            request = EngineRequest(job.path, job.body, name, job.created, job.attempt, waits)
            if job.options is not NO_OPTIONS:
                request.headers = _headers(job.options)
            if begin is not None:
                request.emit = begin(lambda: timer.reschedule(clock()))
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
        own = job.options.inference_id is None
        if isinstance(body, WithHeaders):
            return Answer(200, job.metadata, body.body, name, named_by_message=own, headers=body.headers)
        return Answer(200, job.metadata, body, name, named_by_message=own)


def refusal(error: RequestError, metadata: str | None, name: str) -> Answer:
    """The answer that carries an error."""
    return Answer(error.status_code, metadata, ErrorBody.of(error.detail()), name, error)


def in_place_of(answer: Answer, error: RequestError) -> Answer:
    """The answer that carries what went wrong with another one: the last message of a stream where that was."""
    instead = refusal(error, answer.metadata, answer.response_id)
    instead.stream = without_chunk(answer)
    return instead


def without_chunk(answer: Answer) -> Mapping[str, Any] | None:
    """An answer's `stream`, for an answer in its place that has no chunk in it."""
    return None if answer.stream is None else {**answer.stream, "chunks": 0}


def exhausted(attempts: int, metadata: str | None, name: str) -> Answer:
    """The answer to a request of which no delivery was seen to end: the worker or its lease ended each time."""
    error = Unavailable(f"given up after {attempts} deliveries: each time its worker or its lease was lost")
    return refusal(error, metadata, name)


def failed(exc: Exception, name: str) -> Failed:
    """The error of a request on which we, or the engine, failed in a way that nobody foresaw."""
    # The message of an unforeseen exception may quote the prompt, so it is logged by type and place only.
    log.error("engine_error", response_id=name, error_type=type(exc).__name__, where=places(exc))
    return Failed(f"the engine failed on this request: {type(exc).__name__}")


def _headers(options: Options) -> Mapping[str, str] | None:
    """See `EngineRequest.headers`."""
    given = ((name, getattr(options, field)) for name, field in HEADERS)
    return {name: value for name, value in given if value is not None} or None


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
