"""The worker of many.py and its app: `python -m benchmarks.streaming.talker REQUESTS RESPONSES SETTINGS FILE`.

A whole worker with its engine in a process of its own. SETTINGS is a JSON object. Into FILE go the times at which the
worker's event loop should have come by, every 5 ms, and how late it was, in seconds: a JSON list of pairs.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from rejoinder.worker import service
from rejoinder.worker.functions import generate, generate_stream
from rejoinder.worker.logs import configure
from rejoinder.worker.settings import Settings

APP = "benchmarks.streaming.talker"
BEAT = 0.005


@generate_stream("/talk")
async def talk(body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Say something small at a steady pace, with the time at which it was said."""
    began = time.monotonic()
    for number in range(body["chunks"]):
        yield {"n": number, "at": time.time(), "text": "a word or two"}
        await asyncio.sleep(max(0.0, began + (number + 1) * body["pause"] - time.monotonic()))


@generate("/plain")
async def plain(body: Any) -> Any:
    """Answer at once."""
    return body


async def beat(late: list[tuple[float, float]]) -> None:
    """Note how late the loop is."""
    while True:
        due = time.time() + BEAT
        await asyncio.sleep(BEAT)
        late.append((due, time.time() - due))


def main() -> None:
    requests, responses, given, file = sys.argv[1:]
    configure("json", "warning")
    here = Path(__file__).parents[2]
    settings = Settings(requests=requests, responses=responses, app=APP, app_dir=here, **json.loads(given))
    late: list[tuple[float, float]] = []
    serve = service.serve

    async def watched(*arguments: Any) -> None:
        watch = asyncio.create_task(beat(late))
        try:
            await serve(*arguments)
        finally:
            watch.cancel()
            Path(file).write_text(json.dumps(late))

    service.serve = watched
    service.run(settings)


if __name__ == "__main__":
    main()
