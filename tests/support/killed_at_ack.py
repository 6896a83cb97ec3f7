"""A worker that is killed as it begins its first ack: `python killed_at_ack.py REQUESTS RESPONSES [SETTINGS]`.

Its answer is durable then, and its message is not settled. The engine runs each request for ever. SETTINGS: a JSON
object.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

from slow_worker import SlowEcho

from rejoinder.adapters import open_subscription
from rejoinder.worker import service
from rejoinder.worker.logs import configure
from rejoinder.worker.settings import Settings


class Killing:
    """A subscription whose ack is the process's end."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def ack(self, _messages: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[Any]:
    async with open_subscription(url) as subscription:
        yield Killing(subscription)


def main() -> None:
    requests, responses, *rest = sys.argv[1:]
    configure("json", "info")
    given = json.loads(rest[0]) if rest else {}
    settings = Settings(requests=requests, responses=responses, engine="echo", **given)
    service.open_subscription = opened  # type: ignore[assignment]
    asyncio.run(service.serve(settings, engine=SlowEcho(1e6, 8)))


if __name__ == "__main__":
    main()
