"""A real `rejoinder worker` process, and the queues on both sides of it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rejoinder.adapters import Message, Outgoing, open_subscription, open_topic

LIMIT = 60.0


class Queues:
    """The two queues of a test in one file."""

    def __init__(self, folder: Path, request_options: str = "") -> None:
        base = f"sqlite:///{folder / 'queues.db'}"
        self.requests = f"{base}?queue=requests{request_options}"
        self.responses = f"{base}?queue=responses"

    async def send(self, *bodies: bytes) -> list[str]:
        async with open_topic(self.requests) as topic:
            outcomes = await topic.publish([Outgoing(body) for body in bodies])
        assert all(isinstance(outcome, str) for outcome in outcomes), outcomes
        return [str(outcome) for outcome in outcomes]

    async def receive(self, count: int, limit: float = LIMIT) -> list[Message]:
        """Receive and ack `count` responses."""
        got: list[Message] = []
        deadline = time.monotonic() + limit
        async with open_subscription(self.responses) as subscription:
            while len(got) < count:
                left = deadline - time.monotonic()
                assert left > 0, f"{len(got)} of {count} responses came in {limit:g} s"
                messages = await subscription.receive(500, min(left, 5.0))
                await subscription.ack(messages)
                got += messages
        return got

    async def receive_some(self) -> list[Message]:
        """Receive and ack what responses there are."""
        async with open_subscription(self.responses) as subscription:
            messages = await subscription.receive(1000, 0.05)
            await subscription.ack(messages)
            return messages

    async def until_settled(self, limit: float = LIMIT) -> None:
        """Wait until no request is waiting or held."""
        deadline = time.monotonic() + limit
        async with open_subscription(self.requests) as subscription:
            while True:
                backlog = await subscription.backlog()
                if backlog.waiting + backlog.held == 0:
                    return
                assert time.monotonic() < deadline, backlog
                await asyncio.sleep(0.02)


class WorkerProcess:
    """One worker as its users run it, logging JSON to a file."""

    def __init__(
        self, queues: Queues, log: Path, *arguments: str, engine: Sequence[str] = ("--engine", "echo")
    ) -> None:
        self.log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rejoinder.cli.main", "worker", "--log-format", "json"]
                + ["--requests", queues.requests, "--responses", queues.responses, *engine, *arguments],
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "PYTHONWARNINGS": "error"},
                start_new_session=True,
            )

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The log's events so far, those called `name` or all."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
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

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.kill()
