"""What is up: a file that `up` writes and `down` reads, and the logs beside it."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from local_cloud.errors import CloudError


def folder() -> Path:
    """The folder for state and logs, by the XDG rules."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "rejoinder" / "local-cloud"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` against other processes, which wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass
class State:
    """One local cloud."""

    mode: str
    """`containers` or `processes`."""
    aws_port: int
    pubsub_port: int
    groups: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Of each service that runs as a process: its process group, and what its command line has."""

    @classmethod
    def load(cls) -> Self | None:
        """What was written last; None if nothing is up as far as the file says."""
        file = folder() / "state.json"
        try:
            return cls(**json.loads(file.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as exc:
            raise CloudError(f"cannot read what is up from {file}: {exc}; stop it by hand and remove the file") from exc

    def save(self) -> None:
        """Write it, whole or not at all."""
        new = folder() / "state.json.new"
        new.write_text(json.dumps(asdict(self)))
        new.replace(folder() / "state.json")

    @staticmethod
    def remove() -> None:
        """Forget it."""
        (folder() / "state.json").unlink(missing_ok=True)
