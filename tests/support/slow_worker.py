"""A worker whose engine takes its time: `python slow_worker.py REQUESTS RESPONSES SECONDS CAPACITY [SETTINGS]`.

The body of the answer depends on the request alone, as promised of every engine, and names nothing of the process. A
request whose body has `fails` gets a retryable error on so many of its first deliveries. A stream is the numbers up to
the body's `chunks`, a while between them. SETTINGS: a JSON object.
"""

import asyncio
import hashlib
import json
import random
import sys
from typing import Any

from rejoinder.worker.engines.echo import EchoEngine
from rejoinder.worker.engines.protocol import EngineRequest
from rejoinder.worker.errors import Unavailable
from rejoinder.worker.logs import configure
from rejoinder.worker.service import serve
from rejoinder.worker.settings import Settings


class SlowEcho(EchoEngine):
    """Echo after a random while."""

    def __init__(self, seconds: float, capacity: int) -> None:
        super().__init__("/v1/completions", capacity)
        self.seconds = seconds

    async def generate(self, request: EngineRequest) -> Any:
        for number in range(0 if request.emit is None else request.body["chunks"]):
            await asyncio.sleep(random.uniform(0, 2 * self.seconds))
            request.emit(number)
        await asyncio.sleep(random.uniform(0, 2 * self.seconds))
        if (request.attempt or 1) <= request.body.get("fails", 0):
            raise Unavailable("not on this delivery")
        return {"of": request.body, "seed": hashlib.sha256(request.response_id.encode()).hexdigest()}


def main() -> None:
    requests, responses, seconds, capacity, *rest = sys.argv[1:]
    configure("json", "info")
    given = {"max_attempts": 1000, "retry_delay_seconds": 0.05} | (json.loads(rest[0]) if rest else {})
    settings = Settings(requests=requests, responses=responses, engine="echo", **given)
    asyncio.run(serve(settings, engine=SlowEcho(float(seconds), int(capacity))))


if __name__ == "__main__":
    main()
