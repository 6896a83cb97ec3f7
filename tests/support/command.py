"""Running the command line as a user does."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

REJOINDER = [sys.executable, "-m", "rejoinder.cli.main"]


def rejoinder(
    *args: str | Path, cwd: Path, stdin: bytes = b"", limit: float = 120
) -> subprocess.CompletedProcess[bytes]:
    """Run one command to its end, at most `limit` seconds."""
    command = [*REJOINDER, *map(str, args)]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, timeout=limit, check=False, env=plain())


def start(*args: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start one command, with what `env` adds."""
    pipe = subprocess.PIPE
    command = [*REJOINDER, *map(str, args)]
    return subprocess.Popen(command, cwd=cwd, stdin=pipe, stdout=pipe, stderr=pipe, env=plain() | dict(env or {}))


def plain() -> dict[str, str]:
    """An environment in which nothing of the tester's own speaks along."""
    return {name: value for name, value in os.environ.items() if not name.startswith("REJOINDER_")} | {"COLUMNS": "120"}
