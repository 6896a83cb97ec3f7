"""A worker whose engine's errors quote the request: `python quoting_worker.py REQUESTS RESPONSES LOG_FORMAT`."""

import asyncio
import sys
from typing import Any, cast

from rejoinder.worker.engines.echo import EchoEngine
from rejoinder.worker.engines.protocol import EngineRequest
from rejoinder.worker.logs import configure
from rejoinder.worker.service import serve
from rejoinder.worker.settings import Settings


class Quoting(EchoEngine):
    """Fails on everything, and says on what."""

    async def generate(self, request: EngineRequest) -> Any:
        raise ValueError(f"cannot encode {request.body!r}")


def main() -> None:
    requests, responses, log_format = sys.argv[1:]
    configure(cast("Any", log_format), "debug")
    settings = Settings(requests=requests, responses=responses, engine="echo", max_attempts=1)
    asyncio.run(serve(settings, engine=Quoting("/v1/completions")))


if __name__ == "__main__":
    main()
