"""The messages between a worker and its engine process: length-prefixed JSON over a socket pair.

A frame is four bytes, the length of what follows as an unsigned big-endian integer, and that many bytes of ASCII JSON:
one object whose `kind` says what it is. Never pickle: whatever runs in the engine process must not be able to make the
worker run anything.

| kind | sent by | fields |
|---|---|---|
| `hello` | worker | `factory`, `config`, `sys_path`, `beat_seconds` |
| `ready` | engine | `paths`, `capacity` |
| `generate` | worker | `id`, `path`, `body`, `response_id`, `created`, `stream`, `headers` |
| `cancel` | worker | `id`: the answer is no longer wanted |
| `waiting` | engine | `id`, `waiting`: whether it waits for others' sake, see `EngineRequest.waits` |
| `chunk` | engine | `id`, `body`: the next of a stream |
| `result` | engine | `id`, `body`; `headers` where it has some |
| `error` | engine | `id`, `error`, `message`, `param`, `code`, `delay` |
| `ended` | engine | `id`: what was cancelled has ended, without a result or an error |
| `beat` | engine | `capacity`, `progress`, `running`, `stats` |
| `gone` | engine | `message`: it cannot be loaded, or can serve no more; the process ends |
| `stop` | worker | |
"""

import asyncio
import json
import struct
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any
from uuid import uuid4

Frame = dict[str, Any]

MAX_FRAME = 2**31
"""Bytes. Half of what the prefix can say: more is a stream that lost its place, or a body that no worker can hold."""
_LENGTH = struct.Struct(">I")
_ENCODER = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"))
_LONG_INTEGER = 4300  # digits: above this CPython refuses to convert, since its own conversion is quadratic


class FrameError(ValueError):
    """A value that no frame can carry, or bytes that are no frame."""


def encode(frame: Frame) -> bytes:
    """The frame's bytes. Integers of any size survive, as do lone surrogates, NaN and infinities.

    Raises:
        FrameError: not JSON, nested too deeply, or longer than `MAX_FRAME`.
    """
    try:
        data = _ENCODER.encode(frame).encode("ascii")
    except (TypeError, RecursionError) as exc:
        raise FrameError(f"not a JSON value: {exc}") from exc
    except ValueError as exc:
        data = _encode_long_integers(frame, exc)
    if len(data) > MAX_FRAME:
        raise FrameError(f"a message of {len(data)} bytes; at most {MAX_FRAME} fit between the worker and its engine")
    return _LENGTH.pack(len(data)) + data


def _encode_long_integers(frame: Frame, cause: ValueError) -> bytes:
    """What `int.__repr__` refuses goes through Decimal, whose conversion is not quadratic and has no limit."""
    marks: dict[str, str] = {}
    salt = uuid4().hex  # no value of the sender's can contain it

    def mark(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [mark(item) for item in value]
        if isinstance(value, int) and value.bit_length() > 3 * _LONG_INTEGER:
            token = f"{salt}{len(marks)};"
            marks[f'"{token}"'] = str(Decimal(value))
            return token
        return value

    try:
        text = _ENCODER.encode(mark(frame))
    except RecursionError as exc:
        raise FrameError("nested too deeply") from exc
    except ValueError as exc:  # circular
        raise FrameError(f"not a JSON value: {exc}") from cause
    for token, digits in marks.items():
        text = text.replace(token, digits)
    return text.encode("ascii")


def _integer(text: str) -> int:
    return int(text) if len(text) <= _LONG_INTEGER else int(Decimal(text))


_DECODER = json.JSONDecoder(parse_int=_integer)


class Decoder:
    """Bytes as they arrive, in any pieces, into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.size = 0
        """Bytes of the frame that was yielded last."""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield each frame that is complete now.

        Raises:
            FrameError: what arrived is not a stream of frames.
        """
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, start)
                if length > MAX_FRAME:
                    raise FrameError(f"a frame of {length} bytes is announced; at most {MAX_FRAME} is allowed")
                end = start + _LENGTH.size + length
                if len(self._buffer) < end:
                    break
                text = bytes(self._buffer[start + _LENGTH.size : end])
                start = end
                self.size = length
                yield _decode(text)
        finally:
            del self._buffer[:start]


def _decode(data: bytes) -> Frame:
    try:
        frame = _DECODER.decode(data.decode("ascii"))
    except (ValueError, RecursionError) as exc:
        raise FrameError(f"not a frame: {exc}") from exc
    if not isinstance(frame, dict) or not isinstance(frame.get("kind"), str):
        raise FrameError("not a frame: an object with a kind is expected")
    return frame


class Channel(asyncio.Protocol):
    """One end of the socket pair on an event loop, without threads.

    Args:
        on_frame: Called with each frame, in order.
        on_lost: Called once when the other end is gone, or what it sends is no frame.
    """

    def __init__(self, on_frame: Callable[[Frame], None], on_lost: Callable[[], None]) -> None:
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._decoder = Decoder()
        self._transport: asyncio.Transport | None = None
        self._outgoing: list[bytes] = []
        self._writable = asyncio.Event()
        self._writable.set()

    @property
    def size(self) -> int:
        """Bytes of the frame that `on_frame` was called with last."""
        return self._decoder.size

    @property
    def connected(self) -> bool:
        """Whether there is another end."""
        return self._transport is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        try:
            for frame in self._decoder.feed(data):
                self._on_frame(frame)
        except FrameError:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # the signature is asyncio's
        """Called by the loop."""
        self._transport = None
        self._writable.set()
        self._on_lost()

    def pause_writing(self) -> None:
        """Called by the loop."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Called by the loop."""
        self._writable.set()

    def send(self, data: bytes) -> None:
        """Send an encoded frame; to an end that is gone, nothing. Frames of one loop turn share one write."""
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing.append(data)

    def _flush(self) -> None:
        data, self._outgoing = b"".join(self._outgoing), []
        if self._transport is not None and data:
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait while the other end is slow to read; return at once when it is gone."""
        await self._writable.wait()

    def close(self) -> None:
        """Send what is buffered, then close."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close now."""
        if self._transport is not None:
            self._transport.abort()
