"""A real `rejoinder worker` process, and one with an engine that takes its time."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pairs import LIMIT, Queues

SLOW_WORKER = Path(__file__).parent / "slow_worker.py"


class LoggingProcess:
    """A Python process that logs JSON to a file.

    Args:
        command: What follows the interpreter.
        log: The file; appended to, so that several processes may share it.
        env: Beside the environment of the tests.
        cwd: Where it runs. Default: where the tests do.
    """

    def __init__(
        self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        self.log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "PYTHONWARNINGS": "error", **(env or {})},
                start_new_session=True,
                cwd=cwd,
            )

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The log's events so far, those called `name` or all. gRPC writes lines of its own beside them."""
        lines = [json.loads(line) for line in self.log.read_text(errors="replace").splitlines() if line.startswith("{")]
        return [line for line in lines if name is None or line.get("event") == name]

    def until_event(self, name: str, limit: float = LIMIT, count: int = 1) -> dict[str, Any]:
        deadline = time.monotonic() + limit
        while len(found := self.events(name)) < count:
            assert self.process.poll() is None, (
                f"the worker ended with {self.process.returncode}: {self.log.read_text()}"
            )
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return found[-1]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT)

    def stop(self, limit: float = LIMIT) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(limit)

    def __enter__(self) -> "LoggingProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.kill()


class WorkerProcess(LoggingProcess):
    """One worker as its users run it."""

    def __init__(
        self,
        queues: Queues,
        log: Path,
        *arguments: str,
        engine: Sequence[str] = ("--engine", "echo"),
        env: Mapping[str, str] | None = None,
    ) -> None:
        command = ["-m", "rejoinder.cli.main", "worker", "--log-format", "json"]
        command += ["--requests", queues.requests, "--responses", queues.responses, *engine, *arguments]
        super().__init__(command, log, env)


class SlowWorker(LoggingProcess):
    """One worker with `slow_worker.py`'s engine.

    Args:
        queues: The worker's.
        log: As in `LoggingProcess`.
        seconds: What a request takes on average.
        capacity: The engine's.
        env: As in `LoggingProcess`.
        settings: Of the worker.
    """

    def __init__(
        self,
        queues: Queues,
        log: Path,
        seconds: float = 0.03,
        capacity: int = 8,
        env: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        command = [str(SLOW_WORKER), queues.requests, queues.responses, str(seconds), str(capacity)]
        super().__init__([*command, json.dumps(settings)], log, env)
