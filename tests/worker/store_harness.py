"""What a test does at the far end of a worker's stores."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from worker_harness import Bench, Flaky, until_empty

from rejoinder.adapters import open_blobs
from rejoinder.adapters.driver import BlobStore


def files(folder: Path) -> list[str]:
    """The keys of everything below a directory, finished or not."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class FlakyStore(Flaky):
    """A real store whose calls fail, or never return, when the test says so."""

    def __init__(self, inner: BlobStore) -> None:
        super().__init__()
        self.inner = inner

    def read(self, key: str) -> Any:
        self.calls.append("read")
        if self.fail.get("read"):
            raise self.fail["read"].pop(0)
        return self.inner.read(key)


@contextlib.asynccontextmanager
async def flaky_stores(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[dict[str, FlakyStore]]:
    """Put `FlakyStore` around the stores that workers open from now on; gives them by the last part of their URL."""
    stores: dict[str, FlakyStore] = {}

    @contextlib.asynccontextmanager
    async def opened(url: str) -> AsyncIterator[Any]:
        async with open_blobs(url) as inner:
            name = url.rpartition("/")[2]
            flaky = FlakyStore(inner)
            if name in stores:  # another worker's: the test's faults are of both
                flaky.fail, flaky.hang, flaky.calls = stores[name].fail, stores[name].hang, stores[name].calls
            stores[name] = flaky
            yield flaky

    monkeypatch.setattr("rejoinder.worker.stores.open_blobs", opened)
    yield stores


async def answered(it: Bench, count: int = 1) -> list[dict[str, Any]]:
    """The responses, once all requests are settled too."""
    got = await it.responses_until(count)
    await until_empty(it)
    return got
