"""One engine process from its birth to its death: what the worker says to it, and what it makes of its silence."""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rejoinder.worker.engines.calls import Call, Calls, Interrupted
from rejoinder.worker.engines.frames import Channel, Frame, FrameError, encode
from rejoinder.worker.engines.protocol import EngineRequest, EngineStats
from rejoinder.worker.errors import BadRequest, EngineGone, Unavailable

EXIT_SECONDS = 1.0
"""How long a process whose connection is lost may take to end by itself, so that its exit status can be told."""

DOUBT_SECONDS = 1.0
"""For a process whose request became `Unavailable` to say that it ends. Well above an engine's own watch for that."""


class ChildProcess:
    """An engine in a process of its own. It is started once and ends once; a new one takes its place.

    Args:
        factory: `package.module:callable`, called in the process with the config; it returns an `Engine`.
        config: Any JSON object.
        hang_seconds: Silence, or requests without progress, for this long is a hang: the process is killed.
        cancel_seconds: A request that goes on for this long after it was cancelled costs the process too; None: never.
    """

    def __init__(
        self, factory: str, config: Mapping[str, Any], hang_seconds: float, cancel_seconds: float | None = None
    ) -> None:
        self._factory = factory
        self._config = config
        self._hang_seconds = hang_seconds
        self._cancel_seconds = cancel_seconds
        self._beat_seconds = min(1.0, hang_seconds / 10)
        self._silent = self._stuck = 0.0
        self._running = 0
        self._ids = itertools.count(1)
        self._calls = Calls(self._cancel, cancel_seconds, self._overdue)
        self._reason: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._lost = asyncio.Event()
        self.channel = Channel(self._on_frame, self._lost.set)
        self.paths: frozenset[str] = frozenset()
        self.capacity = 0
        self.progress = 0
        self.stats = EngineStats()
        self.completed = 0
        """Requests that got a result. An error proves nothing: a generation thread that dies sends one to each."""
        self.victims: Sequence[EngineRequest] = ()
        """Once it is dead: what it ran then."""
        self.sacrificed = False
        """It was killed for a cancelled request that went on in it: that is no death, and has no suspects."""

    async def start(self, seconds: float) -> None:
        """Start the process and return when its engine is loaded.

        Raises:
            EngineGone: it could not be started or loaded, died while loading, or took longer than `seconds`.
        """
        try:
            process = self._process = await self._popen()
        except OSError as exc:  # no memory, no descriptors: may pass, and is a death like any other
            raise EngineGone(f"the engine process could not be started: {exc}") from exc
        self._tasks = [asyncio.create_task(self._reap(process))]
        hello = {"kind": "hello", "factory": self._factory, "config": dict(self._config)}
        self.channel.send(encode({**hello, "sys_path": sys.path, "beat_seconds": self._beat_seconds}))
        first: set[asyncio.Future[Any]] = {self._ready, self._dead}
        await asyncio.wait(first, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.done() and not self._dead.done():
            await self.kill(f"it was not ready after {seconds:g} s")
        if not self._ready.done():
            why = self._reason or f"its process ended ({self._dead.result()})"
            raise EngineGone(f"the engine could not be started: {why}")
        self._tasks.append(asyncio.create_task(self._watch(process)))

    async def _popen(self) -> subprocess.Popen[bytes]:
        """Start the process and connect the channel to it; where it fails, nothing is left open."""
        ours, theirs = socket.socketpair()
        try:
            await asyncio.get_running_loop().create_connection(lambda: self.channel, sock=ours)
            return subprocess.Popen(  # noqa: ASYNC220, S603  # vfork: about a millisecond; our own module
                [sys.executable, "-P", "-m", "rejoinder.worker.engines.child", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # the worker's stdout is for results; what a library prints belongs to the log
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C at the terminal is the worker's to handle
            )
        except BaseException:
            if self.channel.connected:
                self.channel.abort()
                await self._lost.wait()
            else:
                ours.close()
            raise
        finally:
            theirs.close()

    @property
    def ending(self) -> bool:
        """Whether it is dead, or is known to be soon."""
        return self._lost.is_set() or self._reason is not None

    async def dead(self) -> str:
        """Return how it died, once it has, and everything of it is gone."""
        return await asyncio.shield(self._dead)

    async def generate(self, request: EngineRequest) -> Any:
        """Run one request in the process; see `Engine.generate`.

        Raises:
            Interrupted: the process was killed for another request's sake; no chunk of this one's stream is out.
        """
        if self.sacrificed:
            raise Interrupted
        if self.ending:
            raise Unavailable("the engine process has ended")
        number = next(self._ids)
        try:
            data = encode(_asked(number, request))
        except FrameError as exc:
            raise BadRequest(f"the body cannot be handed to the engine: {exc}") from exc
        call = self._calls.enter(number, request)
        try:
            self.channel.send(data)
            await self.channel.drain()
            return await call.answer
        except Unavailable:
            # A generation thread that dies tells each request first, and us a moment later: until that is known this
            # request counts as running, and nobody takes its place.
            if call.over:
                await asyncio.wait({self._dead}, timeout=DOUBT_SECONDS)
            raise
        finally:
            self._calls.leave(number)

    def _cancel(self, number: int) -> None:
        self.channel.send(encode({"kind": "cancel", "id": number}))

    def _overdue(self) -> None:
        """What was cancelled goes on: only the end of the process ends it, be it a thread, or C code with the GIL."""
        # One that has died already is not ours to kill: that is a death, and its number may be another's by now.
        if self.ending or self._process is None or self._process.poll() is not None:
            return
        self.sacrificed = True
        self._reason = f"a request went on in it for {self._cancel_seconds:g} s after it was cancelled"
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)  # it leads its group: what it started goes with it
        self._process.kill()

    async def stop(self, seconds: float) -> None:
        """Ask it to end, kill it where it has not after `seconds`, and return when it is gone. Idempotent."""
        if self._process is not None and not self._dead.done():
            self._reason = self._reason or "it was stopped"
            self.channel.send(encode({"kind": "stop"}))
            await asyncio.wait({self._dead}, timeout=seconds)
            await self.kill("it was stopped")

    async def kill(self, reason: str) -> None:
        """End it with SIGKILL and return when it is gone."""
        self._reason = self._reason or reason
        if self._process is None:
            self.channel.abort()
        elif not self._dead.done():
            self._process.kill()
            await self.dead()

    def _on_frame(self, frame: Frame) -> None:
        self._silent = 0.0
        kind = frame["kind"]
        if kind == "chunk":
            self._calls.chunk(frame)
        elif kind == "waiting":
            self._calls.waiting(frame)
        elif kind in {"result", "error", "ended"}:
            self.completed += kind == "result"
            self._calls.settle(frame)
        elif kind in {"beat", "ready"}:
            self.capacity = frame["capacity"]
            if kind == "ready":
                self.paths = frozenset(frame["paths"])
                self._ready.set_result(None)
            elif frame["progress"] != self.progress or not frame["running"]:
                self.progress, self._stuck = frame["progress"], 0.0
            self._running = frame.get("running", 0)
            self.stats = EngineStats(**frame.get("stats", {}))
        elif kind == "gone":
            self._reason = frame["message"]

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Kill it when it hangs. Time is counted in steps: a pause of the worker itself is not held against it."""
        clock = asyncio.get_running_loop().time
        last = clock()
        while not self._lost.is_set():
            await asyncio.sleep(self._beat_seconds)
            step = min(clock() - last, 2 * self._beat_seconds)
            last = clock()
            self._silent += step
            self._stuck += step if self._running else 0.0
            if max(self._silent, self._stuck) > self._hang_seconds:
                what = "silent" if self._silent > self._hang_seconds else "without progress"
                self._reason = self._reason or f"it hung: {what} for {self._hang_seconds:g} s, killed"
                process.kill()
                return

    async def _reap(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for its end, tell everybody who waits for it, and leave nothing behind."""
        gone = asyncio.create_task(_exit_status(process))
        lost = asyncio.create_task(self._lost.wait())
        await asyncio.wait({gone, lost}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({gone}, timeout=EXIT_SECONDS)
        if not gone.done():
            process.kill()
        status = await gone
        # What it said last may still be on its way; a process that it started may hold the connection open.
        await asyncio.wait({lost}, timeout=EXIT_SECONDS)
        self.channel.abort()
        await lost
        how = self._reason or _how(status)
        self.capacity = 0
        self.victims = list(self._calls)
        self._calls.lose(lambda call: self._lost_call(call, how))
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        await asyncio.gather(*self._tasks[1:], return_exceptions=True)
        self._dead.set_result(how)

    def _lost_call(self, call: Call, how: str) -> Exception:
        if not self.sacrificed:
            return Unavailable(f"the engine process died ({how})")
        if call.emitted:
            return Unavailable(f"the engine process was ended ({how}), with a stream in it that had begun")
        return Interrupted()


def _asked(number: int, request: EngineRequest) -> Frame:
    frame = {
        "kind": "generate",
        "id": number,
        "path": request.path,
        "body": request.body,
        "response_id": request.response_id,
        "created": request.created,
    }
    if request.emit is not None:
        frame["stream"] = True
    if request.headers is not None:
        frame["headers"] = dict(request.headers)
    return frame


def _how(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {-status}, {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


async def _exit_status(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a process without a thread: by its pidfd on Linux, by asking elsewhere."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    with contextlib.ExitStack() as stack:
        try:
            fd = os.pidfd_open(process.pid)
            stack.callback(os.close, fd)
            loop.add_reader(fd, ended.set)
            stack.callback(loop.remove_reader, fd)
        except (AttributeError, OSError):  # the latter also where there is no memory or descriptor for it
            while process.poll() is None:  # noqa: ASYNC110  # nothing here would set an event
                await asyncio.sleep(0.1)
        else:
            await ended.wait()
        return process.wait()  # it has ended
