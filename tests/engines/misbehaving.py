"""Engines that do what engines must not do, built in the engine process by the tests of the host."""

import asyncio
import contextlib
import contextvars
import ctypes
import itertools
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

from rejoinder.worker.engines.protocol import EngineStats, WithHeaders
from rejoinder.worker.errors import (
    BadRequest,
    EngineGone,
    Failed,
    Missing,
    RequestTooLarge,
    RetryableError,
    Unavailable,
)

ERRORS = {
    "BadRequest": BadRequest("no", param="x", code="c"),
    "Missing": Missing("no"),
    "RequestTooLarge": RequestTooLarge("no"),
    "Failed": Failed("no"),
    "Unavailable": Unavailable("no"),
}


class Busy(RetryableError):
    def __init__(self):
        super().__init__("come back", delay="soon")


class TooLong(RequestTooLarge):
    pass


class LongerStill(TooLong):
    pass


class Odd(BadRequest):
    pass


class Silent(Unavailable):
    def __init__(self):
        pass


OWN = {"Busy": Busy, "TooLong": lambda: LongerStill("no"), "Odd": lambda: Odd({"not": "a text"}), "Silent": Silent}


def die_if_there(mark):
    if mark.exists():
        os._exit(9)
    mark.touch()


class Misbehaving:
    paths = frozenset({"/do"})

    def __init__(self, config):
        self.capacity = config.get("capacity", 7)
        self.config = config
        self.request = contextvars.ContextVar("request")
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
        if gate := self.config.get("later_loads_wait_for"):
            first, go = Path(f"{gate}.first"), Path(gate)
            while first.exists() and not go.exists():
                time.sleep(0.01)
            first.touch()
        if once := self.config.get("die_after_first_load"):
            die_if_there(Path(once))

    async def generate(self, request):
        what, value = next(iter(request.body.items()))
        self.progress += 1
        self.request.set(request)
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

    async def pid_once_there(self, mark):
        while not Path(mark).exists():
            await asyncio.sleep(0.01)
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

    async def waits_the_first_time(self, mark):
        """Answer in the next process only."""
        if Path(mark).exists():
            return os.getpid()
        Path(mark).touch()
        return await self.waits(None)

    async def emits_and_waits_the_first_time(self, mark):
        if not Path(mark).exists():
            self.request.get().emit("first")
        return await self.waits_the_first_time(mark)

    async def goes_on(self, name):
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await self.waits(name)

    async def goes_on_in_a_thread(self, _):
        thread = asyncio.create_task(asyncio.to_thread(threading.Event().wait))
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(thread)

    async def goes_on_with_a_process(self, mark):
        Path(mark).write_text(str(subprocess.Popen(["sleep", "600"]).pid))
        return await self.goes_on(None)

    async def blocks_the_loop(self, mark):
        Path(mark).touch()
        time.sleep(600)  # as a function that should not be async does

    async def holds_gil_for_ever(self, mark):
        Path(mark).touch()
        ctypes.PyDLL(None).sleep(600)

    async def has_emit(self, _):
        return self.request.get().emit is not None

    async def streams(self, values):
        for at, value in enumerate(values):
            self.request.get().emit([at, value])
            await asyncio.sleep(0)
        return {"chunks": len(values)}

    async def streams_for_ever(self, name):
        try:
            for number in itertools.count():
                self.request.get().emit(number)
                self.progress += 1
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise

    async def streams_object(self, _):
        self.request.get().emit(object())

    async def headers(self, body):
        return WithHeaders(body, self.request.get().headers or {"none": "given"})

    async def size(self, _):
        return self.request.get().size

    async def raises_delay(self, delay):
        raise RetryableError("later", delay=delay)

    async def raises_own(self, name):
        error = OWN[name]()
        raise error

    async def cancels_itself(self, _):
        raise asyncio.CancelledError

    async def environment(self, name):
        return os.environ.get(name)

    async def configured(self, _):
        return sorted(self.config)

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
