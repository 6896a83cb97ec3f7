"""A stream's way to the response topic: its chunks gather for a moment, and one message follows the other.

The first chunk goes at once, and then what has come goes once in each interval, or sooner where it is much. While a
publish is under way, or the broker is away, more gathers. The stream's last message is the request's answer, and goes
the way of all answers, once all chunks are durable: so a reader that has the last message of an attempt knows how many
there are, and nothing is acked before.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog

from rejoinder.adapters import AdapterError, LeaseLost, Message, Outgoing, TooLarge, Transient
from rejoinder.schemas.chunks import Merged
from rejoinder.schemas.envelope import Beside, wrap_response
from rejoinder.schemas.wire import write_json
from rejoinder.worker.batcher import Batcher
from rejoinder.worker.errors import BadRequest, NotGiven, RequestError
from rejoinder.worker.handler import Answer, Job, in_place_of
from rejoinder.worker.inputs import Lines
from rejoinder.worker.lease import Lease
from rejoinder.worker.logs import places
from rejoinder.worker.outputs import ATTRIBUTES
from rejoinder.worker.reply import Outcome, Replier
from rejoinder.worker.retry import entry_until

log = structlog.get_logger(__name__)

# Of one stream, in bytes, waiting for the response broker: as much as a large input.
MAX_WAITING = 64 * 1024 * 1024
# Whose chunks are of OpenAI's shape, so that several can be one.
MERGED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
PARAM = "options.stream"
# What a message says of its place has at most so many digits.
_LARGEST = {"index": 10**15, "done": False, "attempt": 10**15, "chunks": 10**15}


class Streams:
    """Publishes the streams of one worker. Those under way share the calls of the topic.

    Args:
        replier: Publishes.
        carried: Bytes that the response topic carries in one message.
        interval: Seconds between the messages of a stream.
        max_bytes: So much does not wait for the next one, and no message has more unless it is one chunk.
    """

    def __init__(self, replier: Replier, *, carried: int, interval: float, max_bytes: int) -> None:
        self._replier = replier
        # Several calls have their outcome when the slowest has: no stream is to wait for that of another one.
        self._batcher: Batcher[_Piece, Outcome] = Batcher(self._send, max_items=replier.max_keys, full=replier.calls)
        self.carried = carried
        self.interval = interval
        self.max_bytes = max_bytes
        self.bytes = 0
        """Of all streams, not yet durable."""

    def open(self, message: Message, job: Job, lease: Lease, wanted: Callable[[], bool]) -> "StreamWriter":
        """Begin the stream that a request asks for: a new attempt.

        Args:
            message: The request's delivery.
            job: What it asks for.
            lease: The delivery's. Nothing is published while it has run out.
            wanted: Asked before each publish whether there is to be any more of it.
        """
        return StreamWriter(
            self,
            self._replier.addressed(message, job.response_id),
            message=message,
            job=job,
            lease=lease,
            wanted=wanted,
        )

    async def submit(self, outgoing: Outgoing, barred: Callable[[], AdapterError | None]) -> Outcome:
        """Publish one message with the next batch. Raises as `Replier.send`.

        Args:
            outgoing: The message.
            barred: Asked when its turn has come, which may be long after: an outcome in place of publishing it.
        """
        return await self._batcher.submit(_Piece(outgoing, barred))

    async def _send(self, batch: Sequence["_Piece"]) -> list[Outcome]:
        barred = [one.barred() for one in batch]
        going = [one.outgoing for one, instead in zip(batch, barred, strict=True) if instead is None]
        outcomes = iter(await self._replier.send(going) if going else ())
        return [next(outcomes) if instead is None else instead for instead in barred]


@dataclass(frozen=True, slots=True)
class _Piece:
    outgoing: Outgoing
    barred: Callable[[], AdapterError | None]


@dataclass(slots=True)
class _Item:
    """What is one chunk in a message."""

    content: str | Merged
    """Its JSON; or several chunks as one, of which more may come."""
    size: int
    """Bytes of its JSON, at most."""

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else write_json(self.content.value())


def unstreamable(job: Job) -> BadRequest | None:
    """What in a request that asks for a stream cannot be had with one."""
    if isinstance(job.body, Lines):
        return BadRequest("an input of JSON lines has its results stored: it cannot be a stream", param=PARAM)
    for name in ("filename", "output_path_extension"):
        if getattr(job.options, name) is not None:
            return BadRequest(f"a stream is not stored: leave out options.{name} or {PARAM}", param=PARAM)
    return None


class StreamWriter:
    """Writes one attempt at one request's stream. `Streams.open` makes it; whoever holds the request closes it."""

    def __init__(
        self,
        streams: Streams,
        address: Outgoing,
        *,
        message: Message,
        job: Job,
        lease: Lease,
        wanted: Callable[[], bool],
    ) -> None:
        self._streams = streams
        self._address = address
        self._metadata = job.metadata
        self._response_id = job.response_id
        self._lease = lease
        self._still = wanted
        # Where the broker does not count, the time does: a later attempt has a larger one.
        self._attempt = int(time.time() * 1000) if message.attempt is None else message.attempt
        around = len(wrap_response(200, job.metadata, "[]", Beside(stream=_LARGEST))) + ATTRIBUTES
        self._room = streams.carried - around - len(message.id.encode()) - len(job.response_id)
        self._limit = min(streams.max_bytes, self._room)
        self._merges = job.path in MERGED_PATHS
        self._clock = asyncio.get_running_loop().time
        self._items: deque[_Item] = deque()
        self._waiting = 0
        """Bytes of `_items`."""
        self._counted = 0
        """Bytes that `Streams.bytes` has of it."""
        self._some = asyncio.Event()
        self._now = asyncio.Event()
        """What waits goes at once: it is much, or all."""
        self._ending = False
        self._ended = False
        """Nothing more is taken from the engine."""
        self._closed = False
        self._next = 0.0
        self._index = 0
        self._task: asyncio.Task[None] | None = None
        self._failure: RequestError | AdapterError | None = None
        self._stop: Callable[[], None] | None = None

    # ------------------------------------------------------------------ while the engine runs

    def begin(self, stop: Callable[[], None]) -> Callable[[Any], None]:
        """What the engine calls with each chunk. It raises nothing; where the stream fails, it calls `stop`."""
        self._stop = stop
        return self._emit

    def _emit(self, chunk: Any) -> None:
        if self._ended or self._failure is not None:
            return
        try:
            size = self._gathered(chunk)
        except (ValueError, TypeError) as exc:
            log.error("chunk_not_json", response_id=self._response_id, error=str(exc))
            self._end_with(NotGiven(f"a chunk of the stream cannot be written as JSON: {exc}"))
            return
        if size > self._room:
            self._items.pop()
            self._end_with(_too_large(f"a chunk of {size} bytes; {self._room} are carried"))
            return
        self._waiting += size
        self._count(size)
        if self._counted > MAX_WAITING:
            reason = f"{self._counted} bytes of it wait for the response broker; at most {MAX_WAITING} may"
            self._fail(NotGiven(f"the stream was given up: {reason}"))
            return
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        self._some.set()
        if self._waiting >= self._limit:
            self._now.set()

    def _gathered(self, chunk: Any) -> int:
        """Put a chunk to those that wait; return its size there."""
        last = self._items[-1] if self._items else None
        if last is not None and isinstance(last.content, Merged):
            grown = last.content.add(chunk, self._limit - last.size)
            if grown:
                last.size += grown
                return grown
        text = write_json(chunk)
        size = len(text) if text.isascii() else len(text.encode())
        merged = Merged.of(chunk) if self._merges else None
        self._items.append(_Item(merged or text, size))
        return size

    def end(self) -> None:
        """Take nothing more from the engine, and leave it alone: it has answered, or was stopped."""
        self._ended, self._stop = True, None

    def checked(self, answer: Answer) -> Answer:
        """The engine's answer, or in its place what the stream failed of.

        Raises:
            AdapterError: the response broker refuses for good (permission, topic gone).
        """
        if isinstance(self._failure, RequestError):
            return in_place_of(answer, self._failure)
        if self._failure is not None:
            raise self._failure
        return answer

    # ------------------------------------------------------------------ after it

    async def finish(self, answer: Answer) -> Answer:
        """Publish what is left; return the answer as the stream's last message. Raises as `checked`."""
        self.end()
        self._ending = True
        if self._task is not None:
            self._some.set()
            self._now.set()
            await self._task
        answer = self.checked(answer)
        answer.stream = {"index": self._index, "done": True, "attempt": self._attempt}
        if answer.body is None or answer.status_code >= 400:
            answer.stream["chunks"] = 0
        return answer

    def close(self) -> None:
        """Publish nothing more. What is under way may or may not arrive."""
        self.end()
        self._closed = True
        self._drop()
        if self._task is not None:
            self._task.cancel()

    # ------------------------------------------------------------------ publishing

    async def _run(self) -> None:
        try:
            while await self._due():
                await self._publish(*self._taken())
        except LeaseLost:
            self._drop()  # said already, where the lease was found lost
        except (RequestError, AdapterError) as exc:
            self._fail(exc)
        except Exception as exc:  # noqa: BLE001 - a fault of ours is this request's error, not the worker's end
            log.error("stream_error", response_id=self._response_id, error_type=type(exc).__name__, where=places(exc))
            self._fail(NotGiven(f"the stream failed: {type(exc).__name__}"))

    async def _due(self) -> bool:
        """Wait until something is to be published; False: nothing is, or ever will be."""
        await self._some.wait()
        if not self._items:
            return False
        pause = self._next - self._clock()
        if pause > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._now.wait()
        return True

    def _taken(self) -> tuple[list[str], int]:
        """The chunks of the next message, and for how many bytes they were counted."""
        items, size = self._items, 0
        texts: list[str] = []
        while items and (not texts or size + items[0].size + len(texts) <= self._limit):
            item = items.popleft()
            texts.append(item.text())
            size += item.size
        self._waiting -= size
        if not self._ending:
            if not items:
                self._some.clear()
            if self._waiting < self._limit:
                self._now.clear()
        return texts, size

    async def _publish(self, chunks: Sequence[str], size: int) -> None:
        stream = {"index": self._index, "done": False, "attempt": self._attempt}
        body = chunks[0]
        if len(chunks) > 1:
            stream["chunks"], body = len(chunks), f"[{','.join(chunks)}]"
        outgoing = replace(
            self._address,
            body=wrap_response(200, self._metadata, body, Beside(stream=stream)),
            deduplication_id=f"{self._address.deduplication_id}-{self._attempt}-{self._index}",
        )

        self._next = self._clock() + self._streams.interval
        outcome = await entry_until("publish stream", lambda: self._streams.submit(outgoing, self._barred))
        if isinstance(outcome, TooLarge):
            raise _too_large(str(outcome))
        if isinstance(outcome, AdapterError) and not isinstance(outcome, ValueError):
            raise outcome
        if isinstance(outcome, ValueError):
            log.error("chunk_not_carried", response_id=self._response_id, error=str(outcome))
            raise NotGiven("a chunk of the stream cannot be carried by its broker")
        self._index += 1
        self._count(-min(size, self._counted))  # nothing, where the stream has failed meanwhile

    def _barred(self) -> AdapterError | None:
        # One that failed meanwhile sees the message through that is under way: it may be there already.
        if self._closed or not self._still():
            return LeaseLost("the stream is not wanted any more")
        if self._clock() >= self._lease.ends:
            return Transient("the request's lease has run out, and may be another worker's by now")
        return None

    def _count(self, size: int) -> None:
        self._counted += size
        self._streams.bytes += size

    def _drop(self) -> None:
        self._items.clear()
        self._waiting = 0
        self._count(-self._counted)

    def _fail(self, error: RequestError | AdapterError) -> None:
        """The same, and publish nothing of what waits."""
        self._end_with(error)
        self._drop()

    def _end_with(self, error: RequestError | AdapterError) -> None:
        """Let the error be the stream's end, and end the engine's work on it. What came before it is published."""
        if self._failure is None:
            self._failure = error
        if self._stop is not None:
            self._stop()


def _too_large(reason: str) -> NotGiven:
    return NotGiven(f"the stream is too large for its broker: {reason}", code="response_too_large")
