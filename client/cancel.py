"""Cancel requests: leave a mark for each, which the worker that holds the request looks for.

await cancel("s3://my-bucket/jobs/cancels", ["doc-17"])
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from rejoinder.adapters import BadURL, BlobStore, open_blobs
from rejoinder.adapters.cancel_marks import mark_key, marks_url, sqlite_file
from rejoinder.client.patience import patiently

AT_ONCE = 16
"""Marks on their way."""
MAX_ID = 1024
"""Characters. An `inference_id` has 64 at most, and no broker's message id has as many."""


def cancels_of(*, requests: str | None = None, cancels: str | None = None, blobs: str | None = None) -> str:
    """The URL of the marks' store, as a worker with these settings finds it.

    Raises:
        BadURL: nothing says where it is.
    """
    url = marks_url(requests, cancels, blobs)
    if url is None:
        named = f"{requests!r} does not say" if requests else "nothing says"
        raise BadURL(f"{named} where cancel marks are: name the workers' store of them (cancels), or their blobs")
    return url


def queue_file(requests: str) -> Path:
    """The file of a sqlite:// queue, beside which its marks are."""
    return Path(sqlite_file(requests))


async def cancel(url: str, ids: Iterable[str]) -> int:
    """Leave a mark for each id, so that the workers end what has it; return how many ids there were.

    A request that is being worked on when the mark is seen (within 2 s), or comes to a worker later, is answered 499.
    One that has its answer already keeps it. A mark is for requests that were sent before it, not for those that are
    sent with the same `inference_id` a minute after it or later.

    Args:
        url: The store of marks: `cancels_of` what the workers are given.
        ids: Message ids, as `publish` returns them, or `inference_id`s, in any mixture. An SNS topic's message ids are
            not those of a queue that it fills with raw message delivery.

    Raises:
        ValueError: an id is empty, longer than `MAX_ID` or no text; those before it may be marked.
        TypeError: `ids` is one string, whose characters nobody means.
        BadURL: the URL names no store.
        AdapterError: a mark could not be left; others may be.
    """
    if isinstance(ids, str):
        raise TypeError(f"ids is one string, {ids!r:.200}: give a list of ids")
    count = 0
    async with open_blobs(url) as store:
        waiting: set[asyncio.Task[None]] = set()
        try:
            for one in ids:
                waiting.add(asyncio.create_task(_mark(store, _checked(one))))
                count += 1
                if len(waiting) >= AT_ONCE:
                    waiting = await _some(waiting)
            while waiting:
                waiting = await _some(waiting)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
    return count


async def _some(tasks: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Wait until one at least is done; return the others. Raises what they raised."""
    done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    failed = [exc for exc in (task.exception() for task in done) if exc is not None]
    if failed:
        tasks.difference_update(done)
        raise failed[0]
    return others


def _checked(request_id: str) -> str:
    if not 0 < len(request_id) <= MAX_ID or any("\ud800" <= char <= "\udfff" for char in request_id):
        raise ValueError(f"an id is 1 to {MAX_ID} characters of text, not {request_id!r:.200}")
    return request_id


async def _mark(store: BlobStore, request_id: str) -> None:
    # Each try has a key of its own: workers look at the time in it. One that stands was left in the same millisecond.
    await patiently(lambda: store.put(mark_key(request_id, time.time()), _content(request_id), "text/plain"))


async def _content(request_id: str) -> AsyncIterator[bytes]:
    yield request_id.encode()
