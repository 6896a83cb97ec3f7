"""Apps written by tests, and engines that run them."""

import contextlib
import sys
import textwrap
import uuid
from pathlib import Path
from typing import Any

from rejoinder.worker.engines.factory import FUNCTIONS_FACTORY
from rejoinder.worker.engines.functions.engine import FunctionsEngine
from rejoinder.worker.engines.host import EngineProcess, HostSettings
from rejoinder.worker.engines.protocol import EngineRequest

DEFAULT = "/v1/completions"
FUTURE = "from __future__ import annotations\n"
MARKS = """
from rejoinder.worker.functions import *
"""


def write(folder: Path, source: str) -> str:
    """Write a module that no other test has, and return its name."""
    name = f"app_{uuid.uuid4().hex}"
    source = textwrap.dedent(source)
    future, source = (FUTURE, source.replace(FUTURE, "")) if FUTURE in source else ("", source)
    (folder / f"{name}.py").write_text(future + MARKS + source)
    return name


def config(folder: Path, app: str, **more: Any) -> dict[str, Any]:
    return {
        "app": app,
        "app_dir": str(folder),
        "params": {},
        "concurrency": 4,
        "max_batch_size": 8,
        "max_batch_bytes": 1 << 20,
        "max_wait_ms": 1.0,
        "default_path": DEFAULT,
        "device": "cpu",
        **more,
    }


@contextlib.asynccontextmanager
async def serving(folder: Path, source: str, name: str = "", **more: Any):
    """The engine of an app in this process, started."""
    module = write(folder, source)
    engine = FunctionsEngine(config(folder, f"{module}:{name}" if name else module, **more))
    try:
        await engine.start()
        yield engine
    finally:
        await engine.stop()
        sys.modules.pop(module, None)
        while str(folder) in sys.path:
            sys.path.remove(str(folder))


@contextlib.asynccontextmanager
async def in_process(folder: Path, source: str, name: str = "", cancel_seconds: float | None = None, **more: Any):
    """The engine of an app in a process of its own, started."""
    module = write(folder, source)
    own = config(folder, f"{module}:{name}" if name else module, linger=True, **more)
    settings = HostSettings(
        start_seconds=120, restart_backoff=0.05, restart_backoff_limit=0.2, cancel_seconds=cancel_seconds
    )
    engine = EngineProcess(FUNCTIONS_FACTORY, own, settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def request(body: Any = None, path: str = DEFAULT, response_id: str = "r1", **more: Any) -> EngineRequest:
    return EngineRequest(path, body, response_id, 7, **more)


async def ask(engine: Any, body: Any = None, path: str = DEFAULT, **more: Any) -> Any:
    return await engine.generate(request(body, path, **more))
