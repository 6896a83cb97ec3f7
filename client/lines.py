"""JSON lines as bytes. A line ends with LF or CRLF; blank lines count but carry nothing.

A line's number is from 1, as an editor shows it.
"""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import BinaryIO, NamedTuple, TypeVar

T = TypeVar("T")

CHUNK = 1 << 18
"""Bytes asked of a file at once: enough that a read costs nothing beside parsing, little enough to hold."""
BOM = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """One line that is not blank."""

    number: int
    data: bytes
    """Without its newline."""


def strip(number: int, data: bytes) -> bytes:
    """`data` without its newline, and the first line without the mark that some editors put at its start."""
    return (data.removeprefix(BOM) if number == 1 else data).rstrip(b"\r\n")


def one_line(data: bytes) -> bytes:
    """`data` on one line: the same bytes where it holds no newline.

    In JSON a newline that is not escaped stands only between values, where a space means the same: no value changes.
    """
    return data.replace(b"\r", b" ").replace(b"\n", b" ") if b"\n" in data or b"\r" in data else data


def lines_from(file: BinaryIO, number: int = 0) -> Iterator[tuple[Line, int]]:
    """The lines from the file's position on, each with its offset in bytes.

    Args:
        file: Open for reading, at the start of a line.
        number: How many lines are before it.
    """
    offset = file.tell()
    for number, data in enumerate(file, number + 1):  # noqa: B020, PLR1704  # it goes on from there
        text = strip(number, data)
        if text.strip():
            yield Line(number, text), offset
        offset += len(data)


async def stream_lines(fd: int) -> AsyncGenerator[list[Line], None]:
    """The lines of a file, pipe or terminal as they come: what is there is given without waiting for more.

    Args:
        fd: An open file descriptor. Nothing else may read from it.

    Raises:
        OSError: the file cannot be read.
    """
    number = 0
    parts: list[bytes] = []  # of a line whose end has not come yet
    while data := await _in_thread(partial(os.read, fd, CHUNK)):
        head, *others = data.split(b"\n")
        parts.append(head)
        if others:
            whole = [b"".join(parts), *others[:-1]]
            parts = others[-1:]
            if lines := _numbered(whole, number):
                yield lines
            number += len(whole)
    if last := _numbered([b"".join(parts)], number):
        yield last


def _numbered(whole: list[bytes], before: int) -> list[Line]:
    lines = (Line(number, strip(number, data)) for number, data in enumerate(whole, before + 1))
    return [line for line in lines if line.data.strip()]


async def _in_thread(call: Callable[[], T]) -> T:
    """As `asyncio.to_thread`, but the end of the program waits for nobody: a read from a terminal may never return."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(outcome: T | BaseException) -> None:
        if future.done():  # cancelled meanwhile
            return
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def run() -> None:
        outcome: T | BaseException
        try:
            outcome = call()
        except OSError as exc:
            outcome = exc
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=run, name="read-lines", daemon=True).start()
    return await future
