"""The demo's worker: a process of its own, as it would run anywhere, watched while the demo waits for it."""

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from rejoinder.cli.errors import Failure

T = TypeVar("T")

STOP_SECONDS = 40.0
"""After SIGTERM: more than the worker's own grace."""
ABANDON_SECONDS = 10.0
"""The same, when the demo was interrupted or failed and somebody waits for the prompt."""
TAIL_LINES = 20


class DemoWorker:
    """A running worker."""

    def __init__(self, process: Process, log: Path) -> None:
        self._process = process
        self._log = log

    async def watching(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` while the worker lives.

        Raises:
            Failure: the worker ended first; with the last lines of its log.
        """
        task, death = asyncio.ensure_future(work), asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait([task, death], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Failure(self._obituary(f"the worker ended with exit code {death.result()}"))
            return task.result()
        finally:
            task.cancel()
            death.cancel()
            await asyncio.wait([task, death])

    async def stop(self, limit: float = STOP_SECONDS) -> None:
        """Ask it to stop, and wait until it has.

        Raises:
            Failure: it took longer than `limit` seconds and was killed, or did not end with exit code 0.
        """
        if self._process.returncode is None:
            self._process.terminate()
        try:
            code = await asyncio.wait_for(self._process.wait(), limit)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
            raise Failure(self._obituary(f"the worker did not stop within {limit:g} s of SIGTERM")) from None
        if code != 0:
            raise Failure(self._obituary(f"the worker ended with exit code {code}"))

    async def abandon(self) -> None:
        """End it, however it takes that."""
        if self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), ABANDON_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def _obituary(self, what: str) -> str:
        tail = self._log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join([f"{what}; the end of its log:", *(f"  {line}" for line in tail)])


@asynccontextmanager
async def start_worker(model: str, requests: str, responses: str, log: Path) -> AsyncIterator[DemoWorker]:
    """Start a worker on the two queues; it ends with the context, however that ends.

    Only if the demo itself is killed with SIGKILL, the worker stays, until somebody ends it.

    Args:
        model: As `rejoinder worker --model` takes it.
        requests: URL of its requests.
        responses: URL of its responses.
        log: Where its stderr goes.
    """
    command = [sys.executable, "-m", "rejoinder.cli.main", "worker", "--model", model]
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *command, "--requests", requests, "--responses", responses,
            "--config", os.devnull, stdin=DEVNULL, stdout=DEVNULL, stderr=stderr, env=_environment(),
        )  # fmt: skip
    worker = DemoWorker(process, log)
    try:
        yield worker
    finally:
        await worker.abandon()


def _environment() -> dict[str, str]:
    # The demo shows the defaults, so no file of settings is read either. Only the cache's place stays: the model is
    # there by now.
    kept = {"REJOINDER_CACHE_DIR"}
    return {name: value for name, value in os.environ.items() if not name.startswith("REJOINDER_") or name in kept}
