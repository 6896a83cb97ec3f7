"""One object of `file://`: where it stands, reading it, writing it. Blocks: `file_store` calls it in threads."""

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rejoinder.adapters.errors import AdapterError, Denied, NotFound, TooLarge, Transient

UNFINISHED: Final = ".rejoinder-put-"
"""How the names of unfinished objects begin, where they have any. No part of a key may begin so."""
SLOTS: Final = 16
"""Puts of one key at once, where unfinished objects have names."""
TMPFILE: Final[int | None] = getattr(os, "O_TMPFILE", None)
DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: should a pipe have come into the place of the file that was seen there, opening it does not wait for ever.
OBJECT: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_NOT_FOUND: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})
_DENIED: Final = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,  # a file where a directory of the store's would be
        errno.EPERM,
        errno.EROFS,
        errno.ELOOP,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ENOTSUP,
    }
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an object is, or would be."""

    location: str
    root: str
    key: str

    def stands(self) -> bool:
        """Whether there is a regular file. Raises as `BlobStore.exists`."""
        try:
            with self.folder() as (folder, name):
                return self.is_object(folder, name)
        except NotFound:
            return False

    def remove(self) -> None:
        """Remove the regular file there, if there is one. Raises as `BlobStore.remove`."""
        try:
            with self.folder() as (folder, name):
                if self.is_object(folder, name):
                    os.unlink(name, dir_fd=folder)
                    os.fsync(folder)
        except NotFound:
            return

    def is_object(self, folder: int, name: str) -> bool:
        """Whether `name` in `folder` is a regular file, and not a directory. Raises Denied where it is neither."""
        mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise Denied(f"{self.location}: it is no regular file")
        return stat.S_ISREG(mode)

    @contextmanager
    def folder(self, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """Open the directory that the object is in; gives its descriptor and the object's name there.

        Links are resolved first. Then every part is opened without following any: what is moved meanwhile, by whomever,
        cannot lead out of the root.
        """
        with mapped(self.location, writing=make):
            if any(part.startswith(UNFINISHED) for part in self.key.split("/")):
                raise Denied(f"{self.location}: names that begin with {UNFINISHED} are for what is being written")
            root = os.path.realpath(self.root)
            if make:
                _make(Path(root))
            path = os.path.realpath(f"{root}/{self.key}")
            if not path.startswith(f"{root}/"):
                raise Denied(f"{self.location}: a link leads out of the store's directory")
            *parents, name = path.removeprefix(f"{root}/").split("/")
            try:
                folder = os.open(root, DIRECTORY)
            except NotADirectoryError as exc:  # nor will it ever be one
                raise Denied(f"{self.location}: the store's directory {root} is a file, or below one") from exc
            try:
                for parent in parents:
                    folder = _enter(folder, parent, make=make)
                yield folder, name
            finally:
                os.close(folder)


@contextmanager
def mapped(location: str, *, writing: bool) -> Iterator[None]:
    """Map what the operating system says of what is at `location`."""
    try:
        yield
    except OSError as exc:
        kind: type[AdapterError] = Transient
        if exc.errno == errno.EFBIG:
            kind = TooLarge
        elif exc.errno in _NOT_FOUND and not writing:
            kind = NotFound
        elif exc.errno in _DENIED:
            kind = Denied
        raise kind(f"{location}: {exc.strerror}") from exc


def _make(path: Path) -> None:
    """Make a directory and those above it, durably."""
    if not path.is_dir():
        _make(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _enter(folder: int, name: str, *, make: bool) -> int:
    """Open a directory in another one, which is closed if that succeeds."""
    try:
        inner = os.open(name, DIRECTORY, dir_fd=folder)
    except FileNotFoundError:
        if not make:
            raise
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=folder)
        os.fsync(folder)
        inner = os.open(name, DIRECTORY, dir_fd=folder)
    os.close(folder)
    return inner


class Reading:
    """An object that is being read."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._stack = contextlib.ExitStack()
        self._file = -1
        self._left = 0

    def open(self) -> int:
        """Open the object; gives its size. Raises as `BlobStore.read`."""
        with self._place.folder() as (folder, name):
            if not self._place.is_object(folder, name):
                raise NotFound(f"{self._place.location} is a directory")
            self._file = os.open(name, OBJECT, dir_fd=folder)
            self._stack.callback(os.close, self._file)
            status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise Denied(f"{self._place.location}: it is no regular file")
        self._left = status.st_size
        return self._left

    def read(self, size: int) -> bytes:
        """Return the next bytes, none at the end. Raises Transient if the file has become shorter."""
        with mapped(self._place.location, writing=False):
            piece = os.read(self._file, min(size, self._left))
        if not piece and self._left:
            raise Transient(f"{self._place.location} was cut off while it was read, {self._left} bytes before its end")
        self._left -= len(piece)
        return piece

    def close(self) -> None:
        """Let go of the file."""
        self._stack.close()


class Writing:
    """An object that is being written, and that nobody sees before `publish`."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._stack = contextlib.ExitStack()
        self._folder = self._file = -1
        self._name = self._source = ""
        self._source_folder: int | None = None

    def open(self) -> None:
        """Open a file for what is to be written. Raises as `BlobStore.put`."""
        self._folder, self._name = self._stack.enter_context(self._place.folder(make=True))
        with mapped(self._place.location, writing=True):
            self._source, self._source_folder = self._open()

    def _open(self) -> tuple[str, int | None]:
        """Open a file without a name, or one with a name that is no key's; gives what `os.link` is to link."""
        if TMPFILE is not None and Path("/proc/self/fd").is_dir():
            with contextlib.suppress(OSError):
                self._file = os.open(".", TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666, dir_fd=self._folder)
                self._stack.callback(os.close, self._file)
                return f"/proc/self/fd/{self._file}", None
        name = self._free_slot()
        self._stack.callback(os.close, self._file)
        self._stack.callback(_remove, name, self._folder)
        return name, self._folder

    def _free_slot(self) -> str:
        """Open and lock a new file under one of the names that the unfinished of this key have."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        _sweep(self._folder, self._name)
        for name in _slots(self._name):
            with contextlib.suppress(FileExistsError):
                self._file = os.open(name, flags, 0o666, dir_fd=self._folder)
                fcntl.flock(self._file, fcntl.LOCK_EX)
                if os.fstat(self._file).st_nlink:
                    return name
                os.close(self._file)  # another put of this key saw it before it was locked
        raise Transient(f"{self._place.location} is being written by {SLOTS} others")

    def write(self, piece: bytes) -> None:
        """Append. Raises as `BlobStore.put`."""
        with mapped(self._place.location, writing=True), memoryview(piece) as view:
            done = 0
            while done < len(view):
                done += os.write(self._file, view[done:])

    def publish(self) -> bool:
        """Make what was written durable and give it its name, unless there is one. Raises as `BlobStore.put`."""
        with mapped(self._place.location, writing=True):
            os.fsync(self._file)
            try:
                # A destination's directory makes this linkat(AT_SYMLINK_FOLLOW), which /proc/self/fd needs.
                os.link(self._source, self._name, src_dir_fd=self._source_folder, dst_dir_fd=self._folder)
            except FileExistsError:
                if not self._place.is_object(self._folder, self._name):
                    raise Denied(f"{self._place.location} is a directory") from None
                return False
            os.fsync(self._folder)
            return True

    def close(self) -> None:
        """Let go of the file. What was not published is gone."""
        self._stack.close()


def _slots(name: str) -> list[str]:
    beginning = UNFINISHED + hashlib.sha256(name.encode()).hexdigest()[:32]
    return [f"{beginning}-{slot}" for slot in range(SLOTS)]


def _sweep(folder: int, name: str) -> None:
    """Remove what killed writers of this object have left."""
    for left in _slots(name):
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                with contextlib.suppress(BlockingIOError):  # its writer lives
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(left, dir_fd=folder)
            finally:
                os.close(descriptor)


def _remove(name: str, folder: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
