"""Engine processes that run the misbehaving engine."""

import asyncio
import contextlib
import itertools

from children import children

from rejoinder.worker.engines.host import EngineProcess, HostSettings
from rejoinder.worker.engines.protocol import EngineRequest

QUICK = HostSettings(
    start_seconds=120, hang_seconds=60, stop_seconds=60, restart_backoff=0.05, restart_backoff_limit=0.2, max_deaths=3
)
HANGING = HostSettings(
    start_seconds=120, hang_seconds=1, stop_seconds=60, restart_backoff=0.05, restart_backoff_limit=0.2, max_deaths=3
)


@contextlib.asynccontextmanager
async def engine_process(settings=QUICK, **config):
    engine = EngineProcess("misbehaving:create", config, settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
        assert not children()  # neither alive nor zombie


_numbers = itertools.count()


def request(what, value=None, name=None, attempt=None):
    return EngineRequest("/do", {what: value}, name or f"r{next(_numbers)}", 1, attempt)


async def running(engine, *names):
    """Start calls that wait for ever, and return when they are in the process."""
    tasks = [asyncio.create_task(engine.generate(request("waits", name))) for name in names]
    assert await engine.generate(request("echo", 1)) == 1  # frames arrive in order
    return tasks
