"""A worker whose engine takes its time: `python slow_worker.py REQUESTS RESPONSES SECONDS CAPACITY [MAX_ATTEMPTS]`.

The body of the answer depends on the request alone, as promised of every engine, and names nothing of the process.
"""

import asyncio
import hashlib
import random
import sys
from typing import Any

from rejoinder.worker.engines.echo import EchoEngine
from rejoinder.worker.engines.protocol import EngineRequest
from rejoinder.worker.logs import configure
from rejoinder.worker.service import serve
from rejoinder.worker.settings import Settings


class SlowEcho(EchoEngine):
    """Echo after a random while."""

    def __init__(self, seconds: float, capacity: int) -> None:
        super().__init__("/v1/completions", capacity)
        self.seconds = seconds

    async def generate(self, request: EngineRequest) -> Any:
        await asyncio.sleep(random.uniform(0, 2 * self.seconds))
        return {"of": request.body, "seed": hashlib.sha256(request.response_id.encode()).hexdigest()}


def main() -> None:
    requests, responses, seconds, capacity, *rest = sys.argv[1:]
    configure("json", "info")
    settings = Settings(
        requests=requests,
        responses=responses,
        engine="echo",
        max_attempts=int(rest[0]) if rest else 1000,
        retry_delay_seconds=0.05,
    )
    asyncio.run(serve(settings, engine=SlowEcho(float(seconds), int(capacity))))


if __name__ == "__main__":
    main()
