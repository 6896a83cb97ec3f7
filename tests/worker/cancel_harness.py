"""What a test of cancelling does with marks."""

import asyncio
import time
from typing import Any

from worker_harness import Bench

from rejoinder.adapters import open_blobs
from rejoinder.adapters.cancel_marks import name_of
from rejoinder.client.cancel import cancel, cancels_of


def url_of(it: Bench) -> str:
    settings = it.settings
    return cancels_of(requests=settings.requests, cancels=settings.cancels, blobs=settings.blobs)


async def mark(it: Bench, *ids: str) -> None:
    assert await cancel(url_of(it), ids) == len(ids)


async def marks(it: Bench) -> set[str | None]:
    """The names of all marks that there are."""
    async with open_blobs(url_of(it)) as store:
        return {name_of(one.key) async for one in store.list()}


async def until_unmarked(it: Bench, limit: float = 60.0) -> None:
    deadline = time.monotonic() + limit
    while left := await marks(it):
        assert time.monotonic() < deadline, left
        await asyncio.sleep(0.02)


def is_cancelled(response: dict[str, Any], metadata: Any) -> bool:
    return bool(
        response["status_code"] == 499
        and response["metadata"] == metadata
        and response["body"]["error"]["type"] == "cancelled_error"
        and response["body"]["error"]["message"] == "the request was cancelled by its sender"
    )
