"""Two deliveries of one request that come to different answers at once: what the ledger has is what both publish."""

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from rejoinder.adapters import Blob, Message, open_blobs
from rejoinder.adapters.driver import BlobStore
from rejoinder.adapters.memory import fresh_url
from rejoinder.schemas.envelope import Options
from rejoinder.worker.errors import BadRequest
from rejoinder.worker.handler import Answer, Job, refusal
from rejoinder.worker.outputs import Outputs
from rejoinder.worker.stores import Stores

METADATA = '{"n":1}'
KINDS = ("large", "small", "failed")


class Slow:
    """A real store whose calls take some turns of the event loop, before and after they have their effect."""

    def __init__(self, inner: BlobStore, chance: random.Random) -> None:
        self.inner = inner
        self._chance = chance
        self.url = inner.url
        self.location = inner.location

    async def _turns(self) -> None:
        for _ in range(self._chance.randrange(6)):
            await asyncio.sleep(0)

    async def put(self, key: str, chunks: Any, content_type: str) -> bool:
        await self._turns()
        written = await self.inner.put(key, chunks, content_type)
        await self._turns()
        return written

    async def exists(self, key: str) -> bool:
        await self._turns()
        there = await self.inner.exists(key)
        await self._turns()
        return there

    @contextlib.asynccontextmanager
    async def read(self, key: str) -> AsyncIterator[Blob]:
        await self._turns()
        async with self.inner.read(key) as blob:
            await self._turns()
            yield blob


def answer(kind: str, attempt: int) -> Answer:
    if kind == "failed":
        return refusal(BadRequest(f"by delivery {attempt}"), METADATA, "r")
    return Answer(200, METADATA, str(attempt) * (600 if kind == "large" else 1), "r")


async def delivery(outputs: Outputs, attempt: int, kind: str, chance: random.Random) -> bytes:
    """The response of one delivery, from its receipt on."""
    message = Message("m", b"", {}, attempt, 0.0, None)
    job = Job("/run", "body", "r", 0, attempt, METADATA, Options())
    for _ in range(chance.randrange(20)):
        await asyncio.sleep(0)
    got = await outputs.recall(message, job)
    if got is None:
        for _ in range(chance.randrange(20)):
            await asyncio.sleep(0)
        got = answer(kind, attempt)
    kept = (await outputs.keep(message, got, job)).kept
    assert kept is not None
    return kept.wire


@pytest.mark.parametrize("kinds", list(itertools.product(KINDS, KINDS)), ids="-".join)
async def test_both_publish_what_the_ledger_has(kinds: tuple[str, str]) -> None:
    for seed in range(60):
        chance, url = random.Random(seed), fresh_url()
        async with (
            open_blobs(f"{url}/outputs") as outputs,
            open_blobs(f"{url}/failures") as failures,
            open_blobs(f"{url}/ledger") as ledger,
        ):
            stores = Stores(Slow(outputs, chance), Slow(failures, chance), Slow(ledger, chance))
            workers = [Outputs(stores, subscription="s", carried=10**6, max_inline=500) for _ in kinds]
            first, second = await asyncio.gather(*map(delivery, workers, (1, 2), kinds, (chance, chance)))
            async with ledger.read("r.json") as blob:
                stood = b"".join([chunk async for chunk in blob.chunks])
            assert (first, second) == (stood, stood), f"seed {seed}"
            assert await outputs.exists("r.out") or b'"output_location"' not in stood
            assert await failures.exists("r.json") is (b'"failure_location"' in stood)
