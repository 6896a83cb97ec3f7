"""Several engine processes under one worker: one for each GPU, or several on one device."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from rejoinder.worker.engines.calls import Interrupted
from rejoinder.worker.engines.host import EngineProcess
from rejoinder.worker.engines.protocol import EngineRequest, EngineStats
from rejoinder.worker.engines.quarantine import Suspects
from rejoinder.worker.errors import EngineGone


class EnginePool:
    """An `Engine` over several that are alike, each in its process.

    A process that dies takes only its own requests with it, and is started again while the others go on. One that is
    gone for good is logged and not replaced; only when all are gone is the pool.

    Args:
        processes: Not yet started. They serve the same paths, and are named by their devices.
        suspects: What the processes share of them. Suspects run in the last process only: the others never pause.
    """

    def __init__(self, processes: Sequence[EngineProcess], suspects: Suspects) -> None:
        self._processes = tuple(processes)
        self._suspects = suspects

    @property
    def paths(self) -> frozenset[str]:
        """See `Engine.paths`."""
        return self._processes[0].paths

    @property
    def capacity(self) -> int:
        """See `Engine.capacity`: the sum, where a process in quarantine counts as many as it holds, and is thus full.

        So whoever keeps to it finds a process with room for each fresh request.
        """
        return sum(process.capacity if process.open else process.held for process in self._processes)

    @property
    def progress(self) -> int:
        """See `Engine.progress`: the sum."""
        return sum(process.progress for process in self._processes)

    @property
    def stats(self) -> EngineStats:
        """See `Engine.stats`: the sum."""
        return sum((process.stats for process in self._processes), EngineStats())

    async def start(self) -> None:
        """Start all processes at once; see `Engine.start`.

        Raises:
            EngineGone: one could not be started; its name is said, and the others are stopped.
        """
        starts = {asyncio.create_task(process.start()): process.name for process in self._processes}
        try:
            done, _ = await asyncio.wait(starts, return_when=asyncio.FIRST_EXCEPTION)
            for start in done:
                if (exc := start.exception()) is not None:
                    raise EngineGone(f"{starts[start]}: {exc}") from exc
        except BaseException:  # cancelling too
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.stop()
            raise

    async def generate(self, request: EngineRequest) -> Any:
        """Run one request in the process with the most room; see `Engine.generate`.

        One whose process was killed for another's sake goes on where there is room, else it waits for the next process
        there; its time begins anew.
        """
        before: EngineProcess | None = None
        while True:
            left = [process for process in self._processes if process.gone is None]
            if not left:
                raise EngineGone("; ".join(f"{process.name}: {process.gone}" for process in self._processes))
            if self._suspects.company(request, left[-1].size):
                process = left[-1]
            else:
                # None may be open: then one that lives lets it in later, and one that is away would refuse it.
                process = max(left, key=partial(_preference, before))
            try:
                return await process.run(request)
            except EngineGone:  # before it was run: another process can
                continue
            except Interrupted:
                before = process
                if request.waits is not None:
                    request.waits(True)
                    request.waits(False)

    async def wait_gone(self) -> None:
        """See `Engine.wait_gone`."""
        for process in self._processes:
            await process.wait_gone()

    async def stop(self) -> None:
        """End all processes; see `Engine.stop`."""
        await asyncio.gather(*(process.stop() for process in self._processes))


def _preference(before: EngineProcess | None, one: EngineProcess) -> tuple[float, ...]:
    """Room first. A request that has none anywhere waits where it ran before, else where somebody lives."""
    return one.open and one.held < one.capacity, one is before, one.open, one.capacity > 0, one.capacity - one.held
