"""Counts the calls that a process makes to its broker: `python -m benchmarks.brokers.calls FILE MODULE [ARGUMENT ...]`.

Runs `MODULE` as a program, and writes how many calls of each name it made to `FILE` when it ends: JSON, name to count.
"""

import atexit
import json
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import grpc.aio
from aiobotocore.client import AioBaseClient

counts: Counter[str] = Counter()


def _count_aws() -> None:
    call = AioBaseClient._make_api_call

    async def counted(self: Any, operation_name: str, api_params: Any) -> Any:
        counts[operation_name] += 1
        return await call(self, operation_name, api_params)

    AioBaseClient._make_api_call = counted


def _count_grpc() -> None:
    kind = grpc.aio._channel.UnaryUnaryMultiCallable
    call = kind.__call__

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        counts[self._method.decode().rsplit("/", 1)[-1]] += 1
        return call(self, *arguments, **options)

    kind.__call__ = counted


if __name__ == "__main__":
    file, module, *arguments = sys.argv[1:]
    _count_aws()
    _count_grpc()
    atexit.register(lambda: Path(file).write_text(json.dumps(counts)))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
