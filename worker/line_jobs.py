"""Jobs whose input is JSON lines: read, run and stored as a stream, so that no length of it fills the memory.

Each line is run under a slot of its own, and several at once; the job itself has none. Of one job one line at a time
waits for a slot, so that other requests get theirs in turn. The output has one line for each, in their order.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Protocol

import structlog

from rejoinder.adapters import AdapterError
from rejoinder.worker.content import LINES
from rejoinder.worker.errors import EngineGone, RequestError, TimedOut
from rejoinder.worker.handler import Answer, Job, check_expiry, failed, refusal
from rejoinder.worker.inputs import Lines
from rejoinder.worker.line_run import LineRun, Means

log = structlog.get_logger(__name__)

# Jobs that run at once: one can fill the engine, but for its beginning and its end; a short one should not wait for
# a long one. Each has a window's worth of memory, and what its store takes.
JOBS = 4


class StoreStream(Protocol):
    """Stores a job's output while it is made."""

    def __call__(self, job: Job, chunks: AsyncGenerator[bytes], content_type: str, /) -> Awaitable[str]:
        """Return its location. If it stands there already, `chunks` need not be read.

        Raises:
            RequestError: it cannot be stored, or not now.
            AdapterError: the store refuses for good.
            Whatever `chunks` raises.
        """


class LineJobs:
    """Runs jobs of JSON lines.

    Args:
        means: What the lines are run with.
        store: Takes the output.
    """

    def __init__(self, means: Means, store: StoreStream) -> None:
        self._means = means
        self._store = store
        self._turns = asyncio.Semaphore(JOBS)
        self.waiting = 0
        """Jobs that wait for others to end."""

    async def run(self, job: Job, lines: Lines, latest: float, on_wait: Callable[[bool], None]) -> Answer:
        """Run a job to its answer, which names its output's location; an error is an answer too.

        Args:
            job: What is asked.
            lines: The job's input.
            latest: The loop's time by which it must have ended.
            on_wait: Called with False when it begins.

        Raises:
            EngineGone: the engine will not come back.
            AdapterError: the output's store refuses for good.
        """
        name = job.response_id
        timer = asyncio.timeout_at(latest)
        try:
            async with timer, self._turn():
                on_wait(False)
                check_expiry(job)
                location = await self._run(job, lines, latest)
        except RequestError as exc:
            return refusal(exc, job.metadata, name)
        except (EngineGone, AdapterError):
            raise
        except Exception as exc:  # noqa: BLE001 - a fault of ours is this job's error, not the worker's end
            if isinstance(exc, TimeoutError) and timer.expired():
                held = TimedOut("the request was held for as long as the worker may hold it")
                return refusal(held, job.metadata, name)
            return refusal(failed(exc, name), job.metadata, name)
        own = job.options.inference_id is None
        return Answer(200, job.metadata, None, name, named_by_message=own, output_location=location)

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None]:
        self.waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self._turns.release()

    async def _run(self, job: Job, lines: Lines, latest: float) -> str:
        run = LineRun(self._means, job, lines, latest)
        async with aclosing(run.results()) as results:
            location = await self._store(job, results, LINES)
        log.info("lines_done", response_id=job.response_id, lines=run.lines, failed=run.failed, location=location)
        return location
