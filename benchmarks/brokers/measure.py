"""One run of one side: a fresh pair of queues, a backlog, the side's process, and the broker's clock."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.brokers.sides import MODULES, PEERS, WORKER, Broker, Side, command, peer
from benchmarks.clouds import child

LIMIT = 300.0
STOP_SECONDS = 30.0
QUIET_SHARE = 0.1
"""Of a core, all processes of a side together: below it, the side waits for messages."""


async def rate(
    side: Side, broker: Broker, messages: int, receivers: int, calls: Path | None = None
) -> tuple[float, int]:
    """Let `side` work off `messages`.

    Nothing is asked of the broker while the side works: that would take the processor from both.

    Args:
        side: Who works.
        broker: On what.
        messages: How many there are.
        receivers: Of the bare loop.
        calls: A file for the number of calls that the side makes; not for peers.

    Returns:
        Responses that the broker took, per second between the first and the last; and how many were too many.
    """
    module = MODULES[broker]
    async with module.places() as places:
        if side.peer:
            fill_peer(side.peer, places, messages)
        else:
            await module.fill(places[0], [envelope(n) for n in range(messages)])
        arguments = command(side, broker, places, messages, receivers)
        if not side.peer:
            counted = ["benchmarks.brokers.calls", str(calls)] if calls else []
            arguments = [sys.executable, "-m", *counted, *arguments]
        found: list[float] = []
        with working(side, arguments, places) as process:
            deadline = time.monotonic() + LIMIT
            while len(found) < messages:
                if time.monotonic() > deadline:
                    raise SystemExit(f"{side.name} answered {len(found)} of {messages} messages in {LIMIT:g} s")
                until_quiet(process, deadline)
                ended = not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
                await module.take(places[1], found)
                if ended and len(found) < messages:
                    raise SystemExit(f"{side.name} ended with {len(found)} of {messages} messages answered")
    return (len(found) - 1) / (max(found) - min(found)), len(found) - messages


def envelope(number: int) -> bytes:
    return json.dumps({"path": "/echo", "metadata": {"id": number}, "body": {"prompt": f"hello {number}"}}).encode()


def fill_peer(name: str, places: tuple[str, str], messages: int) -> None:
    variables = {**os.environ, **named(places), "MESSAGES": str(messages)}
    subprocess.run(peer(name, "fill"), env=variables, cwd=PEERS, check=True, stdin=subprocess.DEVNULL)


def named(places: tuple[str, str]) -> dict[str, str]:
    return {"REQUESTS": places[0], "RESPONSES": places[1]}


@contextlib.contextmanager
def working(side: Side, arguments: list[str], places: tuple[str, str]) -> Iterator[psutil.Process]:
    """Run a side, and end it: the worker as it should, the others at once."""
    folder, variables = PEERS if side.peer else None, {**os.environ, **named(places)}
    with (
        tempfile.TemporaryFile() as log,
        child(arguments, cwd=folder, env=variables, stdout=log, stderr=log) as process,
    ):
        try:
            yield psutil.Process(process.pid)
            if side.name == WORKER:
                process.send_signal(signal.SIGTERM)
                if code := process.wait(STOP_SECONDS):
                    raise SystemExit(f"the worker ended with {code}")
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-4000:])
            raise


def until_quiet(process: psutil.Process, deadline: float) -> None:
    """Wait until the side's processes have used next to nothing for a second."""
    before: float | None = None
    while time.monotonic() < deadline:
        now = used(process)
        if before is not None and now - before < QUIET_SHARE:
            return
        before = now
        time.sleep(1)


def used(process: psutil.Process) -> float:
    """Seconds of the processor that the process and its children have used."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                total += times.user + times.system
    return total
