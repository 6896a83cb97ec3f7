"""The functions engine: runs the user's own functions, and has no opinion on what a request's body is."""

import asyncio
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from rejoinder.worker.engines.functions import app as apps
from rejoinder.worker.engines.functions.batches import BatchLimits
from rejoinder.worker.engines.functions.binding import Function, is_async
from rejoinder.worker.engines.functions.calling import Caller, Single, Streamed, Together
from rejoinder.worker.engines.functions.context import Deployment
from rejoinder.worker.engines.functions.credentials import Credentials
from rejoinder.worker.engines.functions.failures import failure
from rejoinder.worker.engines.functions.threads import Threads
from rejoinder.worker.engines.protocol import EngineRequest, EngineStats
from rejoinder.worker.errors import BadRequest, EngineGone, Missing, Unavailable

log = structlog.get_logger(__name__)

JOBS_PATH = "/ml/v4/deployments_jobs"
"""Where watsonx.ai takes batch jobs."""


def create(config: Mapping[str, Any]) -> "FunctionsEngine":
    """Make the engine of a config, as `rejoinder.worker.engines.factory.functions_config` writes it."""
    return FunctionsEngine(config)


class FunctionsEngine:
    """Runs the functions of one app.

    Args:
        config: `app`, `app_dir`, `params`, `concurrency`, `max_batch_size`, `max_batch_bytes`, `max_wait_ms`,
            `default_path`, `device`, `token` or `token_file`; and `linger`, where the process is the engine's own: a
            cancelled call of a sync function returns only when its thread is free, so that who hosts the process can
            tell whether it goes on.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._linger = bool(config.get("linger"))
        self._answers: dict[str, Caller] = {}
        self._streams: dict[str, Caller] = {}
        self._batches: list[Together] = []
        self._credentials: Credentials | None = None
        self._threads: Threads | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._done = 0
        self._began = time.monotonic()
        self._places = 0
        self._stopping = False
        self.paths: frozenset[str] = frozenset()
        self.capacity = 0

    @property
    def progress(self) -> int:
        """See `Engine.progress`. It grows while the event loop runs: a call may take as long as its request allows."""
        # In milliseconds: who watches may find a second long.
        return self._done + (int(1000 * (time.monotonic() - self._began)) if self.capacity else 0)

    @property
    def stats(self) -> EngineStats:
        """See `Engine.stats`. A step is a call of a generate_batch."""
        return EngineStats(
            steps=sum(batch.steps for batch in self._batches),
            sequences=sum(batch.sequences for batch in self._batches),
            places=sum(batch.steps * batch.size for batch in self._batches),
        )

    async def start(self) -> None:
        """Import the app, and call its `init` or its service; see `Engine.start`."""
        config = self._config
        self._credentials = Credentials(config)
        self._threads = threads = Threads(linger=self._linger)
        deployment = Deployment(config["params"], config["device"], self._credentials.token)
        name, fields = config["app"], {"app": config["app"]}
        try:
            app = await threads.run(lambda _: apps.load(name, Path(config["app_dir"])))
        except Exception as exc:  # the user's module: whatever it is
            raise apps.gone(exc, f"importing app {name!r}", fields) from exc
        functions = apps.bound(app, deployment)
        if (call := apps.starter(app, deployment)) is not None:
            what = app.service or app.init
            try:
                started = await self._called(call, inline=is_async(what))
            except asyncio.CancelledError:
                raise
            except BaseException as exc:
                raise apps.gone(exc, f"{apps.name_of(what)} of app {name!r}", fields) from exc
            if app.service is not None:
                functions = apps.of_returned(app, started)
            else:
                deployment.state = started
        self._route(functions, deployment, threads)
        self.paths = frozenset({*self._answers, *self._streams})
        self._began = time.monotonic()
        self.capacity = self._places

    async def _called(self, call: Callable[[], Any], *, inline: bool) -> Any:
        assert self._threads is not None  # noqa: S101
        result = call() if inline else await self._threads.run(lambda _: call())
        return await result if inspect.isawaitable(result) else result

    def _route(self, functions: Sequence[Function], deployment: Deployment, threads: Threads) -> None:
        """Say which function answers which path."""
        shared = asyncio.Semaphore(self._config["concurrency"])
        taken: dict[tuple[str, str], Function] = {}
        sharing = False
        for function in functions:
            caller: Caller
            if function.mark.kind == "generate_batch" and not function.job:
                caller = self._together(function, deployment, threads)
            else:
                own = function.mark.concurrency
                lane = shared if own is None else asyncio.Semaphore(own)
                sharing = sharing or own is None
                self._places += own or 0
                kind = Streamed if function.mark.kind == "generate_stream" else Single
                caller = kind(function, deployment, threads, lane)
            for path in self._paths_of(function, functions):
                other = taken.setdefault((path, function.mark.kind), function)
                if other is not function:
                    raise EngineGone(f"{other.name} and {function.name} both serve {path}: give one another path")
                if function.mark.kind == "generate_stream":
                    self._streams[path] = caller
                elif path not in self._answers or function.mark.kind == "generate_batch":
                    self._answers[path] = caller
        self._places += self._config["concurrency"] if sharing else 0

    def _paths_of(self, function: Function, functions: Sequence[Function]) -> list[str]:
        default: str = self._config["default_path"]
        if not function.job:
            return [function.mark.path or default]
        others = [one for one in functions if one.mark.kind != "generate_stream" and not one.job]
        alone = default not in {one.mark.path or default for one in others}
        return [function.mark.path or JOBS_PATH, *([default] if alone else [])]

    def _together(self, function: Function, deployment: Deployment, threads: Threads) -> Together:
        mark, config = function.mark, self._config
        wait = config["max_wait_ms"] if mark.max_wait_ms is None else mark.max_wait_ms
        limits = BatchLimits(
            mark.max_batch_size or config["max_batch_size"],
            mark.max_batch_bytes or config["max_batch_bytes"],
            wait / 1000,
        )
        caller = Together(function, deployment, threads, limits, mark.concurrency or 1, linger=self._linger)
        self._batches.append(caller)
        self._places += caller.places
        return caller

    async def generate(self, request: EngineRequest) -> Any:
        """See `Engine.generate`."""
        if not self.capacity:
            raise Unavailable("the engine is not running")
        callers = self._answers if request.emit is None else self._streams
        caller = callers.get(request.path)
        if caller is None:
            raise self._not_served(request)
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # a coroutine runs in one
        self._running.add(task)
        try:
            return await caller.serve(request, task)
        except GeneratorExit:
            raise
        except BaseException as exc:
            if isinstance(exc, asyncio.CancelledError) and task.cancelling():
                if not self._stopping:
                    raise
                task.uncancel()
                raise Unavailable("the engine is stopping") from exc
            error = failure(exc, request.response_id)
            try:
                if error is exc:
                    raise
                raise error from exc
            finally:
                del error  # its traceback keeps this frame
        finally:
            self._running.discard(task)
            self._done += 1

    def _not_served(self, request: EngineRequest) -> Missing | BadRequest:
        path = request.path
        if path not in self.paths:
            return Missing(f"{path} is not served; {', '.join(sorted(self.paths))} are", param="path")
        if request.emit is None:
            return BadRequest(f"{path} answers in streams only: set options.stream to true", param="options.stream")
        return BadRequest(f"{path} cannot stream: leave options.stream out", param="options.stream")

    async def wait_gone(self) -> None:
        """It cannot die by itself: its process can."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """See `Engine.stop`. A function that is not async and goes on nonetheless is left to itself."""
        self.capacity, self._stopping = 0, True
        if self._threads is not None:
            self._threads.close()
        for task in self._running:
            task.cancel()
        for batch in self._batches:
            await batch.batches.stop()
        if self._threads is not None and (left := await self._threads.stop()):
            log.warning("functions_left_running", calls=left)
        if self._credentials is not None:
            self._credentials.forget()
