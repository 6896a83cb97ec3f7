"""The SQLite file of the embedded broker: how it is created, recognised and opened, and what its errors mean.

Two tables hold the messages, so that a renewal rewrites a few dozen bytes and never a body: `payload` is written once,
`delivery` changes with every lease. `due` is NULL for a message that can be received now, otherwise the wall-clock
second from which it can. The wall clock is used because the file outlives boots: a clock set back by an hour keeps
leased and delayed messages back for that hour, and one set forward ends leases early (their holders learn LeaseLost
if somebody else took the message).
"""

import os
import secrets
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rejoinder.adapters.errors import AdapterError, Denied, NotFound, TooLarge, Transient

T = TypeVar("T")

APPLICATION_ID = 0x524A4E44  # "RJND", at byte 68 of the file
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE rejoinder (file_id TEXT NOT NULL, last_seq INTEGER NOT NULL);
CREATE TABLE payload (seq INTEGER PRIMARY KEY, sent_at REAL NOT NULL, attributes TEXT NOT NULL, body BLOB NOT NULL);
CREATE TABLE delivery (seq INTEGER PRIMARY KEY, queue TEXT NOT NULL, attempt INTEGER NOT NULL, due REAL);
CREATE INDEX ready ON delivery (queue, seq) WHERE due IS NULL;
CREATE INDEX held ON delivery (queue, due) WHERE due IS NOT NULL;
CREATE INDEX retried ON delivery (queue, attempt) WHERE due IS NULL AND attempt > 0
"""
# `last_seq` is ours, not AUTOINCREMENT's, which would be read and written again for every row.

BUSY_SECONDS = 8.0
"""How long to wait for another process's lock: below a third of the default lease, so that a renewal that waited in
vain can be tried again in time. A commit holds the lock for milliseconds."""
BUSY_PAUSE = 0.001
"""Between two tries for the lock. SQLite's own handler backs off to 100 ms, which starves one beside busy ones."""

PRAGMAS = (
    "synchronous = FULL",  # in WAL mode: one fsync for each commit; NORMAL could lose the last commits at power loss
    "wal_autocheckpoint = 2000",  # pages; 8 MiB of log before it is written back
    "journal_size_limit = 67108864",  # bytes that the log keeps on disk after a burst
    "secure_delete = FAST",  # some builds overwrite freed pages with zeros, twice the writing
    "cache_size = -16384",  # KiB
)

Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Database:
    """An open file. Used only by the thread that opened it."""

    path: Path
    connection: sqlite3.Connection
    file_id: str
    identity: Identity
    """Device and inode."""

    def check_in_place(self) -> None:
        """Raise NotFound where the file was deleted or replaced: nobody would ever find what is written to it."""
        if _identity(self.path) != self.identity:
            raise NotFound(f"{self.path} was removed or replaced while it was open")

    def data_version(self) -> int:
        """Return a number that changes whenever another connection has committed."""
        (version,) = self.connection.execute("PRAGMA data_version").fetchone()
        return int(version)


def open_database(path: Path) -> Database:
    """Open the broker's file at `path`, and create it, private to the user, where there is none. Blocks.

    Raises:
        NotFound: its directory is not there.
        Denied: the permissions do not allow it.
        Transient: it is locked for too long, or the disk fails.
        AdapterError: it is no file of ours, or one of a newer version.
    """
    if sqlite3.sqlite_version_info < (3, 35):
        raise AdapterError(f"SQLite 3.35 or later is needed, and this Python has {sqlite3.sqlite_version}")
    try:
        _create_private(path)
        connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=0, isolation_level=None)
        try:
            file_id = patiently(lambda: _prepare(connection, path))
        except BaseException:
            connection.close()
            raise
        identity = _identity(path)
        if identity is None:
            connection.close()
            raise NotFound(f"{path} was removed while it was being opened")
        return Database(path, connection, file_id, identity)
    except (sqlite3.Error, OSError) as exc:
        raise translate(exc, path) from exc


def patiently(attempt: Callable[[], T]) -> T:
    """Call `attempt` until it meets no lock of another process, for `BUSY_SECONDS` at most. Blocks."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return attempt()
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                raise
        time.sleep(BUSY_PAUSE)


def _identity(path: Path) -> Identity | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _create_private(path: Path) -> None:
    # An existing file is never opened here: closing any descriptor of it would drop the locks that SQLite holds on it
    # elsewhere in this process (POSIX). SQLite gives -wal and -shm the mode of the file.
    if not path.parent.is_dir():
        raise NotFound(f"cannot open {path}: there is no directory {path.parent}")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    try:
        os.fchmod(descriptor, 0o600)  # the umask may have taken more away
    finally:
        os.close(descriptor)


def _prepare(connection: sqlite3.Connection, path: Path) -> str:
    if not _is_ours(connection, path):
        _create_schema(connection, path)
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise AdapterError(f"{path} is on a file system that cannot hold a queue: SQLite refused WAL and kept {mode!r}")
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
    (file_id,) = connection.execute("SELECT file_id FROM rejoinder").fetchone()
    return str(file_id)


def _is_ours(connection: sqlite3.Connection, path: Path) -> bool:
    """Tell a file of ours (true) from an empty one (false); raise for any other, before anything is written to it."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application_id != APPLICATION_ID:
        if application_id or version or tables:
            raise AdapterError(
                f"{path} is another program's SQLite database (application id {application_id:#x}, user version "
                f"{version}, {tables} tables and indexes), not a queue"
            )
        return False
    if version > SCHEMA_VERSION:
        raise AdapterError(
            f"{path} has schema version {version} and this Rejoinder knows {SCHEMA_VERSION}: upgrade Rejoinder"
        )
    if version < SCHEMA_VERSION:
        raise AdapterError(f"{path} has schema version {version}, which no released Rejoinder wrote")
    return True


def _create_schema(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        if not _is_ours(connection, path):  # another process may have been quicker
            for statement in SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute("INSERT INTO rejoinder VALUES (?, 0)", (secrets.token_hex(8),))
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


_MEANING: dict[int, type[AdapterError]] = {
    sqlite3.SQLITE_BUSY: Transient,
    sqlite3.SQLITE_LOCKED: Transient,
    sqlite3.SQLITE_PROTOCOL: Transient,
    sqlite3.SQLITE_FULL: Transient,
    sqlite3.SQLITE_IOERR: Transient,
    sqlite3.SQLITE_NOMEM: Transient,
    sqlite3.SQLITE_READONLY: Denied,
    sqlite3.SQLITE_PERM: Denied,
    sqlite3.SQLITE_AUTH: Denied,
    sqlite3.SQLITE_TOOBIG: TooLarge,
}


def translate(exc: Exception, path: Path) -> AdapterError:
    """Return what `exc`, met while working on the file at `path`, means to a caller. Chain it with `from`."""
    match exc:
        case AdapterError():
            return type(exc)(*exc.args)  # one for each caller: a shared exception would gather all their tracebacks
        case sqlite3.Error():
            return _translate_sqlite(exc, path)
        case PermissionError():
            return Denied(f"cannot open {path}: {exc.strerror}")
        case OSError():
            return Transient(f"cannot open {path}: {exc.strerror}")
        case _:
            return AdapterError(f"{path}: {type(exc).__name__}: {exc}")


def _translate_sqlite(exc: sqlite3.Error, path: Path) -> AdapterError:
    code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # errors of the module itself have no code
    if code == sqlite3.SQLITE_NOTADB:
        return AdapterError(f"{path} is not an SQLite database, so not a queue")
    if code == sqlite3.SQLITE_CANTOPEN:
        return _cannot_open(path)
    return _MEANING.get(code, AdapterError)(f"{path}: {exc}")


def _cannot_open(path: Path) -> AdapterError:
    if path.is_dir():
        return AdapterError(f"{path} is a directory, not a queue")
    if not path.exists():
        return NotFound(f"{path} is not there")
    if not (_may(path, os.R_OK | os.W_OK) and _may(path.parent, os.W_OK)):
        return Denied(f"cannot open {path}: it and its directory must be readable and writable")
    return Transient(f"cannot open {path} now")


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)
