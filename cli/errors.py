"""How a command ends, and what is one clear line instead of a traceback."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What the commands end with, besides 128 plus the number of the signal that stopped them."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    INCOMPLETE = 3
    """Some requests are unanswered, or fewer responses came than were asked for."""


class Failure(Exception):
    """A command's own failure: its message is shown as one line, and the program ends with `code`."""

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.code = code


def failure_of(exc: Exception) -> Failure | None:
    """What to tell the user of `exc`; None for what no user can cause: a bug, whose traceback is wanted."""
    # Imported here: `--help` needs none of it.
    import sqlite3  # noqa: PLC0415

    from rejoinder.adapters.errors import AdapterError, BadURL  # noqa: PLC0415

    if isinstance(exc, Failure):
        return exc
    if isinstance(exc, BadURL):
        return Failure(str(exc), ExitCode.USAGE)
    if isinstance(exc, AdapterError):
        return Failure(str(exc) or type(exc).__name__)
    if isinstance(exc, sqlite3.Error):  # of join's index: an adapter's own are AdapterErrors
        return Failure(f"the temporary index cannot be kept: {exc} (TMPDIR names another directory for it)")
    if isinstance(exc, OSError):
        return Failure(str(exc) if exc.filename is None else f"cannot open {exc.filename}: {exc.strerror}")
    return None
