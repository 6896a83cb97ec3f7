"""Streams as they come: which chunk is next, when an answer is whole, and when an attempt replaces an earlier one.

async with aclosing(streamed("sqlite:///work.db?queue=responses", count=1)) as events:
    async for event in events:
        if isinstance(event, Chunks):
            show(event.chunks)
        elif isinstance(event, Restarted):
            forget_what_was_shown()
        elif isinstance(event, Answered):
            save(event.response)

Responses may come in any order, more than once, of several attempts, and between those to other requests.
"""

from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import ValidationError

from rejoinder.client.consume import Received, read_response, responses
from rejoinder.client.keys import key_of, read_json
from rejoinder.client.stream_events import Answered, Chunks, Event, Forgotten, Name, Restarted, Unreadable
from rejoinder.schemas.assembly import assemble, chunks_of
from rejoinder.schemas.envelope import Response, Stream
from rejoinder.schemas.problems import first_problem

__all__ = ["Answered", "Chunks", "Event", "Forgotten", "Name", "Restarted", "Streams", "Unreadable", "streamed"]

HELD_BYTES = 256 << 20
"""Of messages whose streams are not whole yet. Past it the stream that heard nothing for longest is forgotten."""
OVERHEAD_BYTES = 192
"""What Python holds of a message beside its body, at most."""
ATTEMPT_BYTES = 1280
"""And of an attempt beside its messages, the request's part in it."""
REMEMBERED = 1 << 16
"""Requests that are answered already, so that their responses are known when they come again: 20 MiB at most."""


class _Message(NamedTuple):
    """A message of a stream, as it was read."""

    body: bytes
    response: Response
    stream: Stream
    chunks: list[Any]


@dataclass(slots=True)
class _Attempt:
    """What came of one attempt."""

    messages: dict[int, bytes] = field(default_factory=dict)
    last: int | None = None
    again: set[int] = field(default_factory=set)
    """Those that came twice: were there another run of this number, they would be its own too."""
    given: int = 0
    """So many messages were given to the reader."""

    @property
    def size(self) -> int:
        """What its messages take, in bytes."""
        return sum(len(body) + OVERHEAD_BYTES for body in self.messages.values())

    def contradicts(self, stream: Stream, body: bytes) -> bool:
        """Whether a message is of another run than these: one that has its number, where a broker counts anew."""
        if stream.index in self.messages:
            return self.messages[stream.index] != body
        if self.last is not None:
            return stream.done or stream.index > self.last
        return stream.done and max(self.messages, default=-1) > stream.index

    def begin_anew(self, stream: Stream) -> None:
        """Keep only what may also be of the run that this message is of."""
        kept = {index for index in self.again if not (stream.done and index > stream.index)}
        kept -= {self.last, stream.index}
        self.messages = {index: self.messages[index] for index in kept}
        self.last, self.again, self.given = None, set(), 0


@dataclass(slots=True)
class _Open:
    """A request that has no answer yet."""

    attempts: dict[int, _Attempt] = field(default_factory=dict)
    shown: int | None = None
    """The attempt whose chunks the reader was given."""
    size: int = 0


class Streams:
    """Puts responses together. Holds what is not whole yet, `held_bytes` of it at most.

    Args:
        held_bytes: See `HELD_BYTES`.
        remembered: See `REMEMBERED`.
    """

    def __init__(self, *, held_bytes: int = HELD_BYTES, remembered: int = REMEMBERED) -> None:
        self._most = held_bytes
        self._remembered = remembered
        self._open: OrderedDict[Name, _Open] = OrderedDict()
        self._settled: OrderedDict[Name, int | None] = OrderedDict()
        self.held = 0
        """Bytes of messages whose streams are not whole yet, and what Python needs for them."""

    def feed(self, received: Received) -> list[Event]:
        """Take one response; return what it tells, mostly one event, or none where it only repeats or has to wait."""
        try:
            response = received.read()
            stream = response.stream
            chunks = [] if stream is None or _is_failure(response, stream) else chunks_of(stream, response.body)
            name = _name(received, response)
        except ValidationError as exc:
            return [Unreadable(received, _problem(received.body, exc))]
        except ValueError as exc:
            return [Unreadable(received, str(exc))]
        if self._is_settled(name, stream):
            return []
        if stream is None:
            return [self._answered(name, None, response)]
        opened = self._open.setdefault(name, _Open())
        self._open.move_to_end(name)
        events = self._take(name, opened, _Message(received.body, response, stream, chunks))
        return events + self._forget_past_limit()

    def _take(self, name: Name, opened: _Open, message: _Message) -> list[Event]:
        body, response, stream, _ = message
        number = stream.attempt
        if number not in opened.attempts:
            opened.attempts[number] = _Attempt()
            self._hold(opened, ATTEMPT_BYTES)
        attempt = opened.attempts[number]
        events: list[Event] = []
        if attempt.contradicts(stream, body):
            self._hold(opened, -attempt.size)
            attempt.begin_anew(stream)
            self._hold(opened, attempt.size)
            if opened.shown == number:
                events.append(Restarted(name, response.metadata, number))
        elif stream.index in attempt.messages:
            attempt.again.add(stream.index)
            return []
        if _is_failure(response, stream):
            return [*events, self._answered(name, number, response)]
        attempt.messages[stream.index] = body
        self._hold(opened, len(body) + OVERHEAD_BYTES)
        if stream.done:
            attempt.last = stream.index
        whole = attempt.last is not None and len(attempt.messages) == attempt.last + 1
        if whole or opened.shown is None or number >= opened.shown:
            events += self._give(name, opened, number, message)
        if whole:
            events.append(self._whole(name, number, attempt))
        return events

    def _give(self, name: Name, opened: _Open, number: int, new: _Message) -> list[Event]:
        """Give what of an attempt is next in order, of which `new` need not be read again."""
        attempt = opened.attempts[number]
        events: list[Event] = []
        while (body := attempt.messages.get(attempt.given)) is not None:
            response, chunks = (new.response, new.chunks) if attempt.given == new.stream.index else _read(body)
            if opened.shown is not None and opened.shown != number:
                opened.attempts[opened.shown].given = 0  # all of it, should it be the one that gets whole
                events.append(Restarted(name, response.metadata, number))
            opened.shown = number
            attempt.given += 1
            if chunks:
                events.append(Chunks(name, response.metadata, number, chunks))
        return events

    def _whole(self, name: Name, number: int, attempt: _Attempt) -> Answered:
        chunks: list[Any] = []
        for index in range(len(attempt.messages)):
            response, some = _read(attempt.messages[index])
            chunks += some
        return self._answered(name, number, response.model_copy(update={"body": assemble(chunks)}))

    def _answered(self, name: Name, number: int | None, response: Response) -> Answered:
        self._settle(name, None)
        return Answered(name, response.metadata, number, response.model_copy(update={"stream": None}))

    def _is_settled(self, name: Name, stream: Stream | None) -> bool:
        """Whether a message says nothing new. Of what was forgotten, a later attempt or a whole response does."""
        if name not in self._settled:
            return False
        forgotten = self._settled[name]
        return forgotten is None or (stream is not None and stream.attempt <= forgotten)

    def _settle(self, name: Name, forgotten: int | None) -> None:
        opened = self._open.pop(name, None)
        if opened is not None:
            self.held -= opened.size
        self._settled[name] = forgotten
        self._settled.move_to_end(name)
        if len(self._settled) > self._remembered:
            self._settled.popitem(last=False)

    def _hold(self, opened: _Open, size: int) -> None:
        opened.size += size
        self.held += size

    def _forget_past_limit(self) -> list[Event]:
        events: list[Event] = []
        while self.held > self._most:
            name, opened = next(iter(self._open.items()))
            newest = max(opened.attempts)
            self._settle(name, newest)
            events.append(Forgotten(name, newest))
        return events


async def streamed(
    url: str,
    *,
    count: int | None = None,
    idle: float | None = None,
    until: Callable[[], bool] = lambda: False,
    blobs: str | None = None,
    streams: Streams | None = None,
) -> AsyncGenerator[Event, None]:
    """Receive responses, and give what `Streams` makes of them.

    Asking for more than a message told acks it, whether its stream is whole or not: where a reader ends before that,
    what it did not keep of the stream is gone. `rejoinder.client.collect` keeps messages in a file first.

    Args:
        url: As `rejoinder.adapters.open_subscription` takes it.
        count: End after so many answers. Default: never.
        idle: End when this many seconds pass without a message. Default: never.
        until: Asked when more is asked for than a message told, whether to end; the message is acked then, as it is
            not where the caller breaks off (`break`, an exception).
        blobs: As `rejoinder.client.consume.responses` has it.
        streams: What puts them together. Default: one of its own. One that has seen messages before knows them, among
            them the one at which a reader broke off: what that still had to tell is not told again.

    Raises:
        AdapterError: as `responses` does.
    """
    streams = streams or Streams()
    left = count
    source = responses(url, idle=idle, blobs=blobs, until=lambda: (left is not None and left <= 0) or until())
    async with aclosing(source) as incoming:
        async for received in incoming:
            for event in streams.feed(received):
                yield event
                if left is not None and isinstance(event, Answered):
                    left -= 1


def _is_failure(response: Response, stream: Stream) -> bool:
    """Whether it ends its stream by itself: a failure needs nothing of what was said before it."""
    return stream.done and response.status_code >= 400


def _read(body: bytes) -> tuple[Response, list[Any]]:
    response = read_response(body)
    return response, [] if response.stream is None else chunks_of(response.stream, response.body)


def _problem(body: bytes, exc: ValidationError) -> str:
    try:
        return first_problem(exc, Response, read_json(body))[0]
    except ValueError as not_json:
        return f"it is not JSON: {not_json}"


def _name(received: Received, response: Response) -> Name:
    """By the attributes; where a proxy has dropped them, by the metadata, which `join` goes by too."""
    response_id, message_id = (received.attributes.get(key) for key in ("response_id", "request_message_id"))
    if response_id is None or message_id is None:
        return Name("metadata", key_of(response.metadata).hex())
    return Name(response_id, message_id)
