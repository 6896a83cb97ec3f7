"""Runs any engine in a process of its own, and starts it again when it dies.

A poisoned CUDA context, a segmentation fault, a held GIL or an out-of-memory kill costs one engine process: its
requests come back as `Unavailable`, the worker's leases go on, and a new process takes its place.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from rejoinder.worker.engines.calls import Interrupted
from rejoinder.worker.engines.process import ChildProcess
from rejoinder.worker.engines.protocol import EngineRequest, EngineStats
from rejoinder.worker.engines.quarantine import Gate, Suspects
from rejoinder.worker.errors import EngineGone, RequestError, Unavailable

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class HostSettings:
    """When an engine process counts as dead, and how it is started again. All times in seconds."""

    start_seconds: float = 900.0
    """To load the model. Long, for the first start may download it."""
    hang_seconds: float = 120.0
    """Requests without progress, or no sign of life. Well above the longest step, a long prompt's prefill on a CPU."""
    stop_seconds: float = 5.0
    """To end by itself after being asked."""
    cancel_seconds: float | None = None
    """For a request that was cancelled to end in the process, which is killed otherwise; None: it may go on."""
    restart_backoff: float = 0.5
    """Before the first restart; doubles with each death."""
    restart_backoff_limit: float = 30.0
    max_deaths: int = 5
    """Deaths with no request completed in between. Then what kills it is in it, and another start will not help.

    A request that was alone with it is to blame instead, so its deaths do not count; but as many such requests in a row
    are no coincidence.
    """


class EngineProcess:
    """An `Engine` whose work is done by another engine in a child process.

    Args:
        factory: `package.module:callable`. It is called in the child with `config` and returns an `Engine`.
        config: A JSON object.
        settings: When it counts as dead, and how it is started again.
        suspects: The requests that earlier processes died with. Shared by the processes of a worker.
        name: Tells it from others, in the log.
    """

    def __init__(
        self,
        factory: str,
        config: Mapping[str, Any],
        settings: HostSettings | None = None,
        suspects: Suspects | None = None,
        name: str = "engine",
    ) -> None:
        self.name = name
        self._factory = factory
        self._config = dict(config)
        self._settings = settings or HostSettings()
        self._child: ChildProcess | None = None
        self._suspects = Suspects() if suspects is None else suspects
        self._gate = Gate(lambda: self._child is not None and not self._child.ending)
        self._supervisor: asyncio.Task[None] | None = None
        self._paths: frozenset[str] = frozenset()
        self.size = 0
        """The capacity that it started with, and thus has when nothing runs."""
        self._steps = 0
        self._past = EngineStats()
        self._replacing = False
        """The process was killed for a cancelled request that went on, and the next one is not there yet."""
        self._deaths = 0
        self._guilty: set[str] = set()
        self._why = "it has not been started"
        self._gone = asyncio.Event()
        self._ended = True

    @property
    def paths(self) -> frozenset[str]:
        """See `Engine.paths`. Empty before the first start, then what the engine said."""
        return self._paths

    @property
    def capacity(self) -> int:
        """See `Engine.capacity`. As of the last heartbeat; 0 while there is no living process."""
        return self._child.capacity if self._child else 0

    @property
    def progress(self) -> int:
        """See `Engine.progress`. As of the last heartbeat."""
        return self._steps + (self._child.progress if self._child else 0)

    @property
    def stats(self) -> EngineStats:
        """See `Engine.stats`. Of all processes so far, as of the last heartbeat."""
        return self._past + self._child.stats if self._child else self._past

    @property
    def deaths(self) -> int:
        """Deaths since a request was last completed, without those of which one request is guilty."""
        return self._deaths

    @property
    def held(self) -> int:
        """Requests that run, and those that wait for their turn."""
        return self._gate.held

    @property
    def open(self) -> bool:
        """Whether a fresh request would run at once: the process lives, and is in no quarantine."""
        return self._gate.open

    @property
    def gone(self) -> str | None:
        """Why it will not come back; None while it may."""
        return self._why if self._gone.is_set() else None

    async def start(self) -> None:
        """Start the process and load the engine; see `Engine.start`."""
        child = self._child = await self._spawn()
        self._paths, self.size = child.paths, child.capacity
        self._ended = False
        self._supervisor = asyncio.create_task(self._supervise(child))

    async def generate(self, request: EngineRequest) -> Any:
        """Run one request in the process; see `Engine.generate`.

        Where the process is killed because another request went on after it was cancelled, this one is run again in
        the next process: it waits at the gate, so that its own time does not run meanwhile.

        Raises:
            Unavailable: there is no living process now, or it died while it ran this request, or a stream of which
                chunks are out was interrupted.
            EngineGone: there will be none any more; the request was not run.
        """
        while True:
            try:
                return await self.run(request)
            except Interrupted:
                continue

    async def run(self, request: EngineRequest) -> Any:
        """As `generate`, for whoever knows where else to run it.

        Raises:
            Interrupted: the process was killed for another request's sake; the next one waits for this one.
        """
        if self._gone.is_set():
            raise EngineGone(self._why)
        company = self._suspects.company(request, self.size)
        # A suspect has few attempts left: it waits. So do all for a process that is only replaced.
        if self._child is None and (self._ended or not (company or self._replacing)):
            raise self._unavailable()
        await self._gate.enter(company, request.waits)
        try:
            if self._child is None:
                raise self._unavailable()
            body = await self._child.generate(request)
        except RequestError as exc:
            if not isinstance(exc, Unavailable):
                self._suspects.acquit(request)
            raise
        finally:
            self._gate.leave()
        self._suspects.acquit(request)
        return body

    def _unavailable(self) -> Unavailable:
        return Unavailable(f"the engine process is not running ({self._why})")

    async def wait_gone(self) -> None:
        """See `Engine.wait_gone`."""
        await self._gone.wait()

    async def stop(self) -> None:
        """End the process; see `Engine.stop`."""
        self._why = "it was stopped"
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
        child, self._child = self._child, None
        self._ended = True
        self._gate.refuse(self._unavailable)
        if child is not None:
            await child.stop(self._settings.stop_seconds)
            self._past += child.stats

    async def _spawn(self) -> ChildProcess:
        child = ChildProcess(self._factory, self._config, self._settings.hang_seconds, self._settings.cancel_seconds)
        try:
            await child.start(self._settings.start_seconds)
        except BaseException:  # cancelling above all
            await child.kill("it was stopped")
            raise
        return child

    async def _supervise(self, child: ChildProcess) -> None:
        """Keep a process alive until stopped, or until it has died too often."""
        restarted: ChildProcess | None = child
        try:
            while restarted is not None:
                restarted = await self._outlive(restarted)
        except Exception as exc:  # noqa: BLE001  # whatever it is: a worker that waits for nothing would idle for ever
            self._why = f"the engine process cannot be supervised: {type(exc).__name__}: {exc}"
        self._child = None
        self._gone.set()
        log.error("engine_process_lost", name=self.name, why=self._why)
        self._gate.refuse(lambda: EngineGone(self._why))

    async def _outlive(self, child: ChildProcess) -> ChildProcess | None:
        """Wait for the end of a process and start the next one."""
        self._child = child
        self._replacing = False
        self.size = child.capacity
        self._gate.turn()
        self._why = await child.dead()
        self._child = None
        self._steps += child.progress
        self._past += child.stats
        if child.completed:
            self._deaths = 0
            self._guilty.clear()
        if child.sacrificed:
            self._replacing = True
            log.warning("engine_process_replaced", name=self.name, why=self._why, running=len(child.victims))
            return await self._restart(at_once=True)
        guilty = self._suspects.died(child.victims)
        if guilty is None:
            self._deaths += 1
        else:
            self._guilty.add(guilty)
        log.warning("engine_process_died", name=self.name, why=self._why, running=len(child.victims), guilty=guilty)
        return await self._restart()

    async def _restart(self, *, at_once: bool = False) -> ChildProcess | None:
        """Start a process that lives to be ready; None when it has died too often."""
        while max(self._deaths, len(self._guilty)) < self._settings.max_deaths:
            if not at_once:
                delay = self._settings.restart_backoff * 2.0 ** (self._deaths - 1)
                await asyncio.sleep(min(delay, self._settings.restart_backoff_limit))
            at_once = False
            try:
                return await self._spawn()
            except EngineGone as exc:
                self._why = str(exc)
                self._deaths += 1
        times = max(self._deaths, len(self._guilty))
        self._why = f"the engine process died {times} times in a row; the last time: {self._why}"
        return None
