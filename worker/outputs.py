"""From an answer to what is stored and published of it.

A result that is large, or whose sender asks for it, goes to the output path; a failure goes to the failure path; what
is published goes to the ledger before. All of it is written once, under names that every delivery of the request has:
a delivery that comes later finds what is there, and answers with that.

    result -> output object -> ledger -> published
    failure -> ledger -> failure object -> published
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing
from dataclasses import dataclass, replace

import structlog

from rejoinder.adapters import Denied, Message, NotFound, TooLarge, Transient
from rejoinder.adapters.driver import BlobStore
from rejoinder.schemas.envelope import Beside, Options, parse_request, response_head, write_response
from rejoinder.schemas.wire import WireError
from rejoinder.worker.errors import BadRequest, Forbidden, NotGiven, RequestError, Unavailable
from rejoinder.worker.handler import (
    NO_OPTIONS,
    PARSE_IN_THREAD_BYTES,
    Answer,
    Job,
    Kept,
    in_place_of,
    refusal,
    response_id,
)
from rejoinder.worker.ledger import Ledger, stored_answer
from rejoinder.worker.object_names import output_key, record_key
from rejoinder.worker.reply import beside, written
from rejoinder.worker.stores import Stores
from rejoinder.worker.storing import put_once, read_whole, stands

log = structlog.get_logger(__name__)

JSON = "application/json"
# Of a message besides its body: the names and types of the attributes that a response has, and those values whose
# length is bounded. The ids are counted by themselves.
ATTRIBUTES = 400
# Each holds some parts of an object in memory while it is written, and a connection.
CALLS = 32


@dataclass(frozen=True, slots=True)
class _Asked:
    """What of a request says where its answer is."""

    response_id: str
    metadata: str | None
    options: Options


class Outputs:
    """Stores answers, and finds those that are stored.

    While a store is away, it waits: the message is held meanwhile, and its result is not lost.

    Args:
        stores: Where to.
        subscription: The name of the requests' subscription.
        carried: Bytes that the response topic carries in one message.
        max_inline: A larger response has its result stored; None: one that is not carried.
    """

    def __init__(self, stores: Stores, *, subscription: str, carried: int, max_inline: int | None) -> None:
        self._outputs = stores.outputs
        self._failures = stores.failures
        self._pointed = stores.responses
        self._ledger = None if stores.ledger is None else Ledger(stores.ledger)
        self._subscription = subscription
        self._carried = carried
        self._max_inline = max_inline
        self._calls = asyncio.Semaphore(CALLS)
        self.bytes = 0
        """Of results that wait for being stored."""

    # ------------------------------------------------------------------ before the request is run

    async def recall(self, message: Message, job: Job) -> Answer | None:
        """The answer that is stored for a request, or that there is nothing to run for; None: it is to be run.

        Stores are not asked about a request that was never delivered before.

        Raises:
            AdapterError: a store refuses for good.
        """
        asked = _Asked(job.response_id, job.metadata, job.options)
        try:
            self._check_place(job)
        except BadRequest as exc:
            return refusal(exc, job.metadata, job.response_id)
        if message.attempt == 1 and job.options.inference_id is None:
            return None
        return await self._earlier(asked)

    def _check_place(self, job: Job) -> None:
        """Raise BadRequest where the output path cannot have what the sender asks for."""
        if self._outputs is None:
            return
        key = output_key(job.response_id, job.options)
        try:
            self._outputs.location(key)
        except ValueError as exc:
            if not _named_by_sender(job.options):
                raise
            raise BadRequest(f"{_field(job.options)} is too long: {exc}", param=_field(job.options)) from exc

    async def _earlier(self, asked: _Asked) -> Answer | None:
        key = record_key(asked.response_id)
        if self._ledger is not None and (stored := await self._ledger.read(key)) is not None:
            return stored_answer(stored, asked.metadata, asked.response_id, "ledger")
        if self._outputs is not None and (location := await self._stands(self._outputs, asked)) is not None:
            wire = write_response(200, asked.metadata, None, Beside(output_location=location))
            kept = Kept(wire, output_location=location, source="object")
            return Answer(200, asked.metadata, None, asked.response_id, kept=kept)
        if self._failures is not None:
            stored = await read_whole("read failure", self._failures, key)
            if stored is not None:
                return stored_answer(stored, asked.metadata, asked.response_id, "object")
        return None

    async def _stands(self, outputs: BlobStore, asked: _Asked) -> str | None:
        """Where the result is, if it is there."""
        try:
            key = output_key(asked.response_id, asked.options)
            there = await stands("look for output", outputs, key)
        except BadRequest:
            return None
        except (Denied, NotFound, ValueError):
            if _named_by_sender(asked.options):
                return None  # of this key alone, perhaps
            raise
        return outputs.location(key) if there else None

    # ------------------------------------------------------------------ after it

    async def keep(self, message: Message, answer: Answer, job: Job | None) -> Answer:
        """Store of an answer what is to be stored; return what is to be published, which may be an earlier answer.

        Args:
            message: The request's delivery.
            answer: One that is to be given: no retry follows.
            job: The request, where it could be started.

        Raises:
            AdapterError: a store refuses for good.
        """
        if answer.kept is not None:
            return await self._record(message, answer, answer.kept)
        options = job.options if job is not None else await _options(message)
        asked = _Asked(answer.response_id, answer.metadata, options)
        answer, wire = written(message, answer)
        size = len(wire)
        self.bytes += size
        try:
            if answer.status_code < 400:
                try:
                    kept = await self._with_output(message, answer, wire, asked)
                    return await self._record(message, answer, kept)
                except RequestError as exc:
                    answer = in_place_of(answer, exc)
            return await self._failed(message, answer, asked)
        finally:
            self.bytes -= size

    async def _with_output(self, message: Message, answer: Answer, wire: bytes, asked: _Asked) -> Kept:
        location, options = answer.output_location, asked.options
        wanted = len(wire) > self._inline(message, answer) or _named_by_sender(options)
        wanted = wanted and answer.stream is None  # of a stream there is only the last part
        if location is None and not (wanted and self._outputs is not None):
            if self._pointed is None:
                self._check_carried(message, answer, wire)
            return Kept(wire)
        if location is not None:
            return Kept(write_response(200, answer.metadata, None, beside(answer, output_location=location)), location)
        assert self._outputs is not None  # noqa: S101 - asked above
        key = output_key(answer.response_id, options)
        location = self._outputs.location(key)
        response = write_response(200, answer.metadata, None, beside(answer, output_location=location))
        if self._pointed is None:
            self._check_carried(message, answer, response)
        await self._check_undecided(asked)
        body = memoryview(wire)[len(response_head(200, answer.metadata).encode()) : -1]
        await self._put_output(self._outputs, key, body, options)
        return Kept(response, output_location=location)

    async def _check_undecided(self, asked: _Asked) -> None:
        """Raise RequestError where another delivery has failed meanwhile: no result may stand beside its failure.

        `_failed` finds its answer, whatever it is.
        """
        key, stored = record_key(asked.response_id), None
        if self._ledger is not None:
            stored = await self._ledger.read(key)
        elif self._failures is not None:
            stored = await read_whole("read failure", self._failures, key)
        if stored is not None and stored_answer(stored, asked.metadata, asked.response_id, "object") is not None:
            raise NotGiven("another delivery of this request was answered meanwhile")

    async def _put_output(self, outputs: BlobStore, key: str, body: memoryview, options: Options) -> None:
        try:
            async with self._calls:
                await put_once("store output", outputs, key, body, JSON)
        except TooLarge as exc:
            raise _too_large(f"its store: {exc}") from exc
        except (Denied, NotFound, ValueError) as exc:
            if not _named_by_sender(options):
                raise
            # Perhaps of this key alone, which the sender chose: the worker goes on. If the store refuses everything,
            # it refuses the failure that follows, and the worker ends.
            raise _refused(outputs, key, options, exc) from exc

    async def _failed(self, message: Message, answer: Answer, asked: _Asked) -> Answer:
        if (earlier := await self._earlier(asked)) is not None and earlier.kept is not None:
            return await self._record(message, earlier, earlier.kept)
        key = record_key(answer.response_id)
        location = None if self._failures is None else self._failures.location(key)
        wire = write_response(
            answer.status_code, answer.metadata, answer.body, beside(answer, failure_location=location)
        )
        return await self._record(message, answer, Kept(wire, failure_location=location))

    async def _record(self, message: Message, answer: Answer, kept: Kept) -> Answer:
        """Let what is published be what is stored: by whoever was first."""
        key = record_key(answer.response_id)
        if self._ledger is not None and kept.source != "ledger":
            async with self._calls:
                stored = await self._ledger.put(key, kept.wire)
            answer, kept = _adopted(stored, answer, kept, "ledger")
        if self._failures is not None and kept.failure_location is not None and kept.source != "object":
            async with self._calls:
                new = await put_once("store failure", self._failures, key, kept.wire, JSON)
            if not new and kept.source == "":
                stored = await read_whole("read failure", self._failures, key) or kept.wire
                answer, kept = _adopted(stored, answer, kept, "object")
        if self._pointed is not None and len(kept.wire) > self._room(message, answer):
            kept = await self._point(self._pointed, message, answer, kept)
        return replace(answer, kept=kept)

    async def _point(self, store: BlobStore, message: Message, answer: Answer, kept: Kept) -> Kept:
        """Store the response itself."""
        # Of the message, not of an inference_id: two requests that share one have metadata of their own.
        own = answer.named_by_message  # as of one of several requests of a message
        key = record_key(answer.response_id if own else response_id(self._subscription, message.id, None))
        async with self._calls:
            new = await put_once("store response", store, key, kept.wire, JSON)
        wire = kept.wire if new else await read_whole("read response", store, key) or kept.wire
        return replace(kept, wire=wire, pointer=store.location(key))

    # ------------------------------------------------------------------ JSON lines

    async def store_stream(self, job: Job, chunks: AsyncIterable[bytes], content_type: str) -> str:
        """Store a result while it is made; return its location, for `Answer.output_location`.

        If another delivery has stored one meanwhile, that one stands.

        Args:
            job: The request.
            chunks: The result. Asked for once: it cannot be sent again.
            content_type: Of the object.

        Raises:
            BadRequest: there is no output path.
            Unavailable: the store is away, and another attempt makes the result anew.
            RequestError: the store does not take it.
            AdapterError: the store refuses for good.
            Whatever `chunks` raises.
        """
        if self._outputs is None:
            raise BadRequest("a result of lines needs an output path, and this worker has none", param="input_location")
        key = output_key(job.response_id, job.options)
        asked = _Asked(job.response_id, job.metadata, job.options)
        try:
            async with self._calls, aclosing(self._undecided(chunks, asked)) as checked:
                await self._outputs.put(key, checked, content_type)
        except Transient as exc:
            raise Unavailable(f"the output store is away: {exc}") from exc
        except TooLarge as exc:
            raise _too_large(f"its store: {exc}") from exc
        except (Denied, NotFound) as exc:
            if not _named_by_sender(job.options):
                raise
            raise _refused(self._outputs, key, job.options, exc) from exc
        return self._outputs.location(key)

    async def _undecided(self, chunks: AsyncIterable[bytes], asked: _Asked) -> AsyncGenerator[bytes]:
        async for chunk in chunks:
            yield chunk
        await self._check_undecided(asked)

    # ------------------------------------------------------------------ sizes

    def _room(self, message: Message, answer: Answer) -> int:
        """Bytes that are left for the body of a response."""
        return self._carried - ATTRIBUTES - len(message.id.encode()) - len(answer.response_id)

    def _inline(self, message: Message, answer: Answer) -> float:
        limit = float("inf") if self._max_inline is None else self._max_inline
        # Where the response may go as a pointer, what the topic carries is no bound.
        return limit if self._pointed is not None else min(limit, self._room(message, answer))

    def _check_carried(self, message: Message, answer: Answer, wire: bytes) -> None:
        room = self._room(message, answer)
        if len(wire) > room:
            raise _too_large(f"its broker: {len(wire)} bytes; {room} are carried")


def _named_by_sender(options: Options) -> bool:
    return options.filename is not None or options.output_path_extension is not None


def _too_large(reason: str) -> NotGiven:
    return NotGiven(f"the response is too large for {reason}", code="response_too_large")


def _field(options: Options) -> str:
    """Which one."""
    return f"options.{'filename' if options.output_path_extension is None else 'output_path_extension'}"


def _refused(outputs: BlobStore, key: str, options: Options, exc: Exception) -> RequestError:
    return Forbidden(f"the output store does not take {outputs.location(key)!r}: {exc}", param=_field(options))


def _adopted(stored: bytes, answer: Answer, kept: Kept, source: str) -> tuple[Answer, Kept]:
    """What stands under the answer's name, which is published; the answer itself where that is it."""
    if stored == kept.wire:
        return answer, kept
    other = stored_answer(stored, answer.metadata, answer.response_id, "ledger" if source == "ledger" else "object")
    if other is None or other.kept is None:
        return answer, kept
    log.info("answered_by_another", response_id=answer.response_id, status_code=other.status_code, found_in=source)
    return other, other.kept


async def _options(message: Message) -> Options:
    """The options of a request that was refused: they say where an earlier delivery's answer would be."""
    try:
        if len(message.body) > PARSE_IN_THREAD_BYTES:
            return (await asyncio.to_thread(parse_request, message.body)).options or NO_OPTIONS
        return parse_request(message.body).options or NO_OPTIONS
    except WireError:
        return NO_OPTIONS
