"""Responses from a broker into a file, durable there before they are acked: what `join` reads when given a URL."""

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import BinaryIO

from rejoinder.client.consume import batches
from rejoinder.client.join import Join
from rejoinder.client.lines import one_line

BLOCK = 1 << 16


def open_kept(path: Path) -> BinaryIO:
    """Open the file of kept responses to append to it, without the half line that a crash may have left.

    What is dropped was not acked, and comes again. The file is locked until it is closed: another join would take a
    line that is just being written for such a half.

    Raises:
        OSError: it cannot be opened or written, or another process has it.
    """
    file = _locked(path)
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - BLOCK)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    file.truncate(end)
    _sync_directory(path.absolute().parent)
    return file


def _locked(path: Path) -> BinaryIO:
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                return file
        except OSError as exc:
            file.close()
            if exc.errno == errno.EWOULDBLOCK:
                raise OSError(errno.EWOULDBLOCK, "another join is writing to it", str(path)) from exc
            raise
        file.close()  # its owner finished and deleted it in between: what is written to it would be lost


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


async def collect(
    join: Join,
    url: str,
    kept: BinaryIO,
    *,
    idle: float | None = None,
    blobs: str | None = None,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Receive responses until every request of `join` has one, or none came for `idle` seconds.

    Those that are stored are read from the store `blobs`.

    Each batch is appended to `kept`, whose file is the responses' file of `join`, and is acked when it is on the disk.

    Raises:
        AdapterError: the broker says so.
        OSError: `kept` cannot be written; what was not, is not acked.
    """
    async with aclosing(batches(url, idle=idle, until=lambda: join.missing == 0, blobs=blobs)) as incoming:
        async for batch in incoming:
            kept.write(b"".join(one_line(received.body) + b"\n" for received in batch))
            kept.flush()
            os.fsync(kept.fileno())
            join.read_responses()
            progress()


def _sync_directory(path: Path) -> None:
    # A new file's name is durable only with its directory.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
