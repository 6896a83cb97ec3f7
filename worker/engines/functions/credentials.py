"""The functions' token: where it is, and when it has changed."""

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from rejoinder.worker.errors import EngineGone, RetryableError

log = structlog.get_logger(__name__)

VARIABLE = "USER_TOKEN_FILE_PATH"
"""Of the environment: the file that watsonx.ai's services read their token from."""
SETTLED_NANOSECONDS = 2_000_000_000
"""A file that was written this recently is read each time: a change within a clock tick would look like none."""


class Token:
    """A token in a file that somebody else keeps fresh, in place or by renaming a new one over it.

    Args:
        path: The file.

    Raises:
        EngineGone: there is no token in it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[tuple[int, ...], str] | None = None
        try:
            self._read()
        except ValueError as exc:
            raise EngineGone(f"token_file {path} {exc}") from exc

    def __call__(self) -> str:
        """The current token. May be called in any thread.

        Raises:
            RetryableError: there is none now. Its text may reach a sender, so the file's place is in the log alone.
        """
        try:
            return self._read()
        except ValueError as exc:
            log.warning("token_missing", token_file=str(self._path), error=str(exc))
            raise RetryableError(f"the worker's token_file {exc}") from exc

    def _read(self) -> str:
        """The current token, or a ValueError that says what is wrong with the file."""
        try:
            stat = self._path.stat()
            mark = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            seen = self._seen
            if seen is not None and seen[0] == mark:
                return seen[1]
            token = self._path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
            raise ValueError(f"cannot be read: {reason}") from exc
        if not token or not token.isprintable() or " " in token:
            what = "holds more than a token" if token else "is empty"
            raise ValueError(what)
        self._seen = (mark, token) if time.time_ns() - stat.st_mtime_ns > SETTLED_NANOSECONDS else None
        return token


class Credentials:
    """The functions' token, and the environment that names its file.

    Args:
        config: `token` or `token_file`, or neither.

    Raises:
        EngineGone: there is no token where the settings say.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.token: Token | None = None
        self._descriptor: int | None = None
        self._own: Path | None = None
        file, token = config.get("token_file"), config.get("token")
        if token is not None:
            path = self._private(token)
        elif file is not None:
            path = Path(file).absolute()
        else:
            return
        self.token = Token(path)
        os.environ[VARIABLE] = str(path)

    def _private(self, token: str) -> Path:
        """A file that only this user can read."""
        if hasattr(os, "memfd_create"):  # never on a disk, and gone with the process however it ends
            self._descriptor = os.memfd_create("token", os.MFD_CLOEXEC)
            os.fchmod(self._descriptor, 0o600)
            os.write(self._descriptor, token.encode())
            return Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")
        descriptor, name = tempfile.mkstemp(prefix="token-")  # of mode 0600
        with os.fdopen(descriptor, "w") as file:
            file.write(token)
        self._own = Path(name)
        return self._own

    def forget(self) -> None:
        """Take it out of the environment again."""
        if self.token is not None:
            os.environ.pop(VARIABLE, None)
        if self._descriptor is not None:
            os.close(self._descriptor)
        if self._own is not None:
            self._own.unlink(missing_ok=True)
        self.token = self._descriptor = self._own = None
