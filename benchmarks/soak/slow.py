"""The soak's worker: `python -m benchmarks.soak.slow REQUESTS RESPONSES SHORTEST LONGEST CAPACITY DIARY`.

A whole worker but for its engine, which takes its time. It writes each job's start, and once a second how many asyncio
tasks there are, to the file DIARY: a JSON object a line.
"""

import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from rejoinder.worker.engines.echo import EchoEngine
from rejoinder.worker.engines.protocol import EngineRequest
from rejoinder.worker.logs import configure
from rejoinder.worker.service import serve
from rejoinder.worker.settings import Settings

SAMPLE_SECONDS = 1.0


class SlowEcho(EchoEngine):
    """Echo after a while of any length between two."""

    def __init__(self, shortest: float, longest: float, capacity: int, diary: TextIO) -> None:
        super().__init__("/v1/completions", capacity)
        self._bounds = shortest, longest
        self._diary = diary

    def write(self, **entry: Any) -> None:
        """Add a line to the diary."""
        self._diary.write(json.dumps({"at": time.time(), **entry}) + "\n")

    async def start(self) -> None:
        """Begin to count tasks."""
        await super().start()
        self._watch = asyncio.create_task(self._count_tasks())

    async def _count_tasks(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            self.write(tasks=len(asyncio.all_tasks()))

    async def generate(self, request: EngineRequest) -> Any:
        """Return the body, later."""
        seconds = random.uniform(*self._bounds)
        self.write(start=request.body["id"], seconds=seconds)
        await asyncio.sleep(seconds)
        return await super().generate(request)

    async def stop(self) -> None:
        """Take no more."""
        self._watch.cancel()
        await super().stop()


def main() -> None:
    requests, responses, shortest, longest, capacity, diary = sys.argv[1:]
    configure("json", "info")
    settings = Settings(requests=requests, responses=responses, engine="echo")
    with Path(diary).open("w", buffering=1) as file:
        engine = SlowEcho(float(shortest), float(longest), int(capacity), file)
        asyncio.run(serve(settings, engine=engine))


if __name__ == "__main__":
    main()
