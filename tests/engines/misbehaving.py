"""Engines that do what engines must not do, built in the engine process by the tests of the host."""

import asyncio
import ctypes
import os
import signal
import time
from pathlib import Path

from rejoinder.worker.engines.protocol import EngineStats
from rejoinder.worker.errors import BadRequest, EngineGone, Failed, Missing, RequestTooLarge, Unavailable

ERRORS = {
    "BadRequest": BadRequest("no", param="x", code="c"),
    "Missing": Missing("no"),
    "RequestTooLarge": RequestTooLarge("no"),
    "Failed": Failed("no"),
    "Unavailable": Unavailable("no"),
}


def die_if_there(mark):
    if mark.exists():
        os._exit(9)
    mark.touch()


class Misbehaving:
    paths = frozenset({"/do"})

    def __init__(self, config):
        self.capacity = config.get("capacity", 7)
        self.config = config
        self.progress = 0
        self.cancelled = []
        self.gone = asyncio.Event()

    @property
    def stats(self):
        return EngineStats(steps=self.progress)

    async def start(self):
        print("what is printed goes to the log, not to stdout")  # noqa: T201  # that is the test
        if delay := self.config.get("load_seconds"):
            time.sleep(delay)  # as a model that loads does
        if error := self.config.get("load_error"):
            raise EngineGone(error)
        if self.config.get("load_crash"):
            raise RuntimeError("weights are upside down\nsecond line")
        if once := self.config.get("die_after_first_load"):
            die_if_there(Path(once))

    async def generate(self, request):
        what, value = next(iter(request.body.items()))
        self.progress += 1
        return await getattr(self, what)(value)

    async def echo(self, value):
        return value

    async def raises(self, name):
        raise ERRORS[name]

    async def crashes(self, message):
        try:
            int(message)
        except ValueError as exc:
            raise RuntimeError(message) from exc

    async def gone_now(self, message):
        raise EngineGone(message)

    async def ends(self, _):
        self.gone.set()
        return await self.waits(None)

    async def fails_with_all(self, _):
        self.gone.set()
        raise Unavailable("the whole batch failed")

    async def exits(self, status):
        os._exit(status)

    async def signals(self, number):
        os.kill(os.getpid(), number)
        return await self.waits(None)

    async def signals_group(self, number):
        os.killpg(0, number)
        return "alive"

    async def pid(self, _):
        return os.getpid()

    async def pid_after(self, seconds):
        await asyncio.sleep(seconds)
        return os.getpid()

    async def returns_object(self, _):
        return object()

    async def waits(self, name):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise

    async def was_cancelled(self, _):
        return self.cancelled

    async def holds_gil(self, seconds):
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
        return "awake"

    async def holds_gil_until(self, fifo):
        with Path(fifo).open("rb", buffering=0) as file:  # noqa: ASYNC230  # blocking is the point
            ctypes.PyDLL(None).read(file.fileno(), ctypes.create_string_buffer(1), 1)
        return "awake"

    async def stops_itself(self, _):
        os.kill(os.getpid(), signal.SIGSTOP)

    async def wait_gone(self):
        await self.gone.wait()

    async def stop(self):
        if self.config.get("stop_hangs"):
            ctypes.PyDLL(None).usleep(60_000_000)


def create(config):
    return Misbehaving(config)


def create_echo(config):
    from rejoinder.worker.engines.echo import EchoEngine

    return EchoEngine(config["path"])
