"""The engine process: loads an engine, runs what the worker sends, and never outlives it.

`python -m rejoinder.worker.engines.child FD`, where FD is one end of a socket pair. The worker starts it; nobody else.
"""

import asyncio
import ctypes
import faulthandler
import gc
import importlib
import io
import itertools
import math
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from rejoinder.worker.engines.calls import known
from rejoinder.worker.engines.frames import Channel, Frame, FrameError, encode
from rejoinder.worker.engines.protocol import Engine, EngineRequest, WithHeaders
from rejoinder.worker.errors import EngineGone, Failed, NotGiven, RequestError

STOP_SECONDS = 3.0
"""For the engine to free what it holds. What it does not, the end of the process does."""
VISIBLE_DEVICE = "visible_device"
"""A config's key whose value is the number of the one GPU, of those visible, that the process may see. For code that
takes `cuda` to be its own: it is hidden from the factory, and done before the factory's module is imported."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    """Run until the worker says stop, or is gone."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # a process that the engine starts must not hold the connection open
    # The worker decides when this process ends: a service manager signals every process of its group at once.
    # A handler that does nothing, for SIG_IGN would pass to all that the engine starts: nobody could end those.
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    os.register_at_fork(after_in_child=_heed)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what is printed is to be seen, even if the process dies next
    # A crash in C code ends the process without a word. This says on stderr which lines of Python were running.
    faulthandler.enable()
    if sys.platform == "linux":
        # The kernel kills this process with the thread that started it, the worker's event loop, even while a C call
        # holds the GIL. Where there is no such thing, or the worker died before this line, the end of the pipe tells.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    asyncio.run(_serve(socket.socket(fileno=descriptor)))


def _heed() -> None:
    """In a process forked by the engine, which may have to be ended by a signal."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


async def _serve(connection: socket.socket) -> None:
    child = _Child()
    await asyncio.get_running_loop().create_connection(lambda: child.channel, sock=connection)
    status = await child.run()
    sys.stderr.flush()
    # Not sys.exit: that waits for threads, and a generation thread in a long step is no reason to outlive the worker.
    os._exit(status)


class _Child:
    def __init__(self) -> None:
        self.channel = Channel(self._on_frame, self._on_lost)
        self._hello: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._engine: Engine | None = None
        self._debug = False

    async def run(self) -> int:
        """Serve to the end; return the exit status."""
        hello = await self._hello
        self._debug = bool(hello["config"].get("debug"))
        try:
            engine = self._engine = await _load(hello)
        except EngineGone as exc:
            return await self._gone(str(exc))
        except Exception as exc:  # noqa: BLE001  # whatever it is, the worker is told in one line and the log in full
            traceback.print_exc()
            return await self._gone(_line(exc))
        # What is loaded stays: the collector need not look at a million objects of libraries between two steps.
        gc.collect()
        gc.freeze()
        paths = sorted(engine.paths)
        self.channel.send(encode({"kind": "ready", "paths": paths, "capacity": engine.capacity}))
        beat = asyncio.create_task(self._beat(engine, hello["beat_seconds"]))
        stop, gone = asyncio.create_task(self._stop.wait()), asyncio.create_task(engine.wait_gone())
        await asyncio.wait({stop, gone}, return_when=asyncio.FIRST_COMPLETED)
        beat.cancel()
        self._say(engine)  # the last word on what was done
        if gone.done():
            if self._tasks:  # each is told its own error first
                await asyncio.wait(self._tasks.values(), timeout=STOP_SECONDS)
            failure = gone.exception()
            return await self._gone(_line(failure) if failure else "the engine can serve no more")
        for task in self._tasks.values():
            task.cancel()
        await asyncio.wait({asyncio.create_task(engine.stop())}, timeout=STOP_SECONDS)
        return 0

    async def _gone(self, message: str) -> int:
        self.channel.send(encode({"kind": "gone", "message": message}))
        self.channel.close()
        await asyncio.wait({asyncio.create_task(self._stop.wait())}, timeout=STOP_SECONDS)  # until it is sent
        return 1

    async def _beat(self, engine: Engine, seconds: float) -> None:
        while True:
            self._say(engine)
            await asyncio.sleep(seconds)

    def _say(self, engine: Engine) -> None:
        fields = {"capacity": engine.capacity, "progress": engine.progress, "running": len(self._tasks)}
        self.channel.send(encode({"kind": "beat", **fields, "stats": asdict(engine.stats)}))

    def _on_frame(self, frame: Frame) -> None:
        kind = frame["kind"]
        if kind == "generate" and self._engine is not None:
            number: int = frame["id"]
            task = asyncio.create_task(self._generate(self._engine, number, self._request(frame)))
            self._tasks[number] = task
            task.add_done_callback(lambda _: self._ended(number))
        elif kind == "cancel" and frame["id"] in self._tasks:
            self._tasks[frame["id"]].cancel()
        elif kind == "hello":
            self._hello.set_result(frame)
        elif kind == "stop":
            if self._engine is None:
                os._exit(0)  # loading cannot be interrupted, and nothing is held yet
            self._stop.set()

    def _on_lost(self) -> None:
        if self._engine is None:
            os._exit(1)
        self._stop.set()

    def _ended(self, number: int) -> None:
        """A request's task is done. It is said here, for one that is cancelled may never have run a line."""
        if self._tasks.pop(number).cancelled() and not self._stop.is_set():
            self.channel.send(encode({"kind": "ended", "id": number}))

    def _request(self, frame: Frame) -> EngineRequest:
        """A request as the engine sees it, from the frame that came last."""
        number = frame["id"]

        def emit(chunk: Any) -> None:
            try:
                self.channel.send(encode({"kind": "chunk", "id": number, "body": chunk}))
            except FrameError as exc:
                raise NotGiven(f"a chunk of the stream cannot be sent: {exc}") from exc

        def waits(waiting: bool) -> None:
            self.channel.send(encode({"kind": "waiting", "id": number, "waiting": waiting}))

        return EngineRequest(
            frame["path"],
            frame["body"],
            frame["response_id"],
            frame["created"],
            waits=waits,
            emit=emit if frame.get("stream") else None,
            headers=frame.get("headers"),
            size=self.channel.size,
        )

    async def _generate(self, engine: Engine, number: int, request: EngineRequest) -> None:
        try:
            data = _result(number, await engine.generate(request))
        except RequestError as exc:
            data = _error(number, exc)
        except EngineGone as exc:
            self.channel.send(encode({"kind": "gone", "message": str(exc)}))
            self._stop.set()
            return
        except FrameError as exc:
            data = _error(number, Failed(f"the engine's result cannot be sent: {exc}"))
        except Exception as exc:  # noqa: BLE001  # a request's own failure: its neighbours go on
            # The message may quote the prompt, which belongs neither into logs nor into an answer that is kept long.
            sys.stderr.write(traceback.format_exc() if self._debug else "".join(_frames(exc)))
            data = _error(number, Failed(f"the engine failed on this request: {type(exc).__name__}"))
        self.channel.send(data)
        await self.channel.drain()


async def _load(hello: Frame) -> Engine:
    """Build the engine and start it. The factory runs in a thread: the end of the worker is noticed meanwhile."""
    sys.path[:] = hello["sys_path"]
    if (device := hello["config"].pop(VISIBLE_DEVICE, None)) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible(device, os.environ.get("CUDA_VISIBLE_DEVICES"))
    module, _, name = hello["factory"].partition(":")
    try:
        factory: Callable[[Any], Engine] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as exc:
        raise EngineGone(f"there is no engine {hello['factory']!r}: {exc}") from exc
    engine = await asyncio.to_thread(factory, hello["config"])
    await engine.start()
    return engine


def visible(device: int, mask: str | None) -> str:
    """The value of CUDA_VISIBLE_DEVICES that leaves only the device of this number, of those that `mask` leaves.

    Raises:
        EngineGone: the mask leaves fewer.
    """
    if mask is None:
        return str(device)
    # As CUDA reads it: what follows the first entry that is none does not count.
    names = list(itertools.takewhile(lambda name: name and not name.startswith("-"), map(str.strip, mask.split(","))))
    if device >= len(names):
        raise EngineGone(f"there is no device cuda:{device}: CUDA_VISIBLE_DEVICES={mask} leaves {len(names)} of them")
    return names[device]


def _result(number: int, result: Any) -> bytes:
    if not isinstance(result, WithHeaders):
        return encode({"kind": "result", "id": number, "body": result})
    headers = dict(result.headers)
    return encode({"kind": "result", "id": number, "body": result.body, "headers": headers})


def _error(number: int, exc: RequestError) -> bytes:
    """An error as a frame. A class of somebody's own may have put anything into it, or never called ours."""
    param, code, delay = (getattr(exc, name, None) for name in ("param", "code", "delay"))
    fields = {
        "message": str(getattr(exc, "message", exc)),
        "param": None if param is None else str(param),
        "code": None if code is None else str(code),
        "delay": float(delay) if isinstance(delay, int | float) and math.isfinite(delay) else None,
    }
    return encode({"kind": "error", "id": number, "error": known(type(exc)), **fields})


def _frames(exc: BaseException) -> Iterator[str]:
    """An exception's traceback as Python prints it, those that led to it first, without their messages."""
    before = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
    if before is not None:
        yield from _frames(before)
        yield "\nwhich led to:\n\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(exc.__traceback__)
    yield f"{type(exc).__module__}.{type(exc).__qualname__}: its message is shown at log level debug\n"


def _line(exc: BaseException) -> str:
    """An exception in one line without its traceback, which is in the log."""
    first = str(exc).strip().partition("\n")[0][:300]
    return f"{type(exc).__name__}: {first}" if first else type(exc).__name__


if __name__ == "__main__":
    main()
