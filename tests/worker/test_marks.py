"""How a worker looks for marks: what a listing costs, and which clocks it bears."""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from marks_harness import Store, leave, looking, until_all
from virtual_time import virtually
from worker_harness import GateEngine, bench, until

from rejoinder.adapters import Transient, open_blobs
from rejoinder.adapters.driver import Listed
from rejoinder.adapters.memory import fresh_url
from rejoinder.client.cancel import cancel
from rejoinder.worker import marks as marks_module

FAR = marks_module.FAR


@virtually
async def test_what_lies_there_is_listed_once() -> None:
    async with looking() as (marks, store):
        for number in range(3000):
            await leave(store, f"stale-{number}", time.time() - 3600 - number)
        for _ in range(20):
            await marks.look()
        await until_all(store, 1)
        assert (store.listed, store.whole) == ([0] * 20, [3000])
        assert len(marks.known) == 3000
        await leave(store, "new")
        await marks.look()
        assert (store.listed, store.whole) == ([0] * 20 + [1], [3000])
        assert "new" in marks.known


@virtually
async def test_what_was_left_a_little_before_the_start_does_not_wait_for_all_the_old_ones() -> None:
    async with looking() as (marks, store):
        store.gate.clear()
        real = store.inner

        async def slow(after: str) -> AsyncGenerator[Listed, None]:
            if not after:
                await store.gate.wait()
            async for one in real.list(after):
                yield one

        store.inner = SimpleNamespace(list=slow, url="memory://slow")
        await leave(real, "stale", time.time() - 3600)
        await leave(real, "a", time.time() - 60)
        await marks.look()
        assert set(marks.known) == {"a"}
        store.gate.set()
        await until_all(store, 1)
        assert set(marks.known) == {"a", "stale"}


@virtually
async def test_what_was_just_left_is_listed_for_a_little_while_and_then_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [time.time()]
    monkeypatch.setattr(marks_module, "time", SimpleNamespace(time=lambda: now[0]))
    async with looking() as (marks, store):
        for number in range(1000):
            await leave(store, f"bulk-{number}", now[0])
        await marks.look()
        for _ in range(5):
            now[0] += 10.0
            await marks.look()
        # The near ones look 20 s back from the last; the far one comes again after as many seconds as its cost asks.
        assert store.listed == [1000, 1000, 1000, 1000, 0, 0]
        assert marks._far_due > marks._clock() + 1000 / marks_module.RATE - 1
        marks._far_due = 0.0
        await marks.look()
        assert store.listed[6:] == [1000]


@pytest.mark.parametrize("behind", [-3600.0, -60.0, 0.0, 19.0, 60.0, FAR - 1])
@virtually
async def test_a_clock_may_be_behind_or_ahead(behind: float) -> None:
    async with looking() as (marks, store):
        for _ in range(3):
            await marks.look()
        await until_all(store, 1)
        await leave(store, "a", time.time() - behind)
        await marks.look()
        assert "a" in marks.known
        assert store.whole == [0]


@virtually
async def test_what_a_clock_far_behind_left_is_found_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async with looking() as (marks, store):
        await marks.look()
        await until_all(store, 1)
        await leave(store, "a", time.time() - FAR - 60)
        await marks.look()
        assert "a" not in marks.known
        marks._all_due = 0.0
        await marks.look()
        await until_all(store, 2)
        assert "a" in marks.known


@virtually
async def test_the_workers_own_clock_may_be_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = [3600.0]
    monkeypatch.setattr(marks_module, "time", SimpleNamespace(time=lambda: time.time() + ahead[0]))
    async with looking() as (marks, store):
        await marks.look()
        await marks.look()
        ahead[0] = 0.0
        await leave(store, "a")
        await marks.look()
        assert "a" in marks.known


@virtually
async def test_what_was_left_in_a_long_pause_is_new() -> None:
    async with looking() as (marks, store):
        await marks.look()
        await until_all(store, 1)
        marks._since = dict.fromkeys(marks._since, time.time() - 86_400)
        await leave(store, "a", time.time() - 80_000)
        await marks.look()
        assert "a" in marks.known


@virtually
async def test_a_listing_that_fails_leaves_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [time.time()]
    monkeypatch.setattr(marks_module, "time", SimpleNamespace(time=lambda: now[0]))
    async with looking() as (marks, store):
        await marks.look()
        await until_all(store, 1)
        real, store.inner = store.inner, SimpleNamespace(list=_away, url="memory://away")
        await leave(real, "a", now[0] + 1)
        for _ in range(10):
            now[0] += 60.0
            await marks.look()
        store.inner = real
        await marks.look()
        assert "a" in marks.known


async def _away(_after: str) -> AsyncGenerator[Listed, None]:
    raise Transient("away")
    yield


@virtually
async def test_a_listing_of_everything_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks_module, "EVERY", 0.0)
    async with looking() as (marks, store):
        await leave(store, "a", time.time() - 3600)
        real, store.inner = store.inner, SimpleNamespace(list=_away, url="memory://away")
        await marks.look()
        await until(lambda: not marks._is_listing_all)
        store.inner = real
        await marks.look()
        await until_all(store, 1)
        assert "a" in marks.known


@virtually
async def test_a_listing_of_everything_that_takes_long_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stores: list[Store] = []

    @asynccontextmanager
    async def opened(url: str) -> AsyncIterator[Any]:
        async with open_blobs(url) as inner:
            stores.append(Store(inner))
            stores[-1].gate.clear()
            yield stores[-1]

    monkeypatch.setattr("rejoinder.worker.stores.open_blobs", opened)
    url = fresh_url()
    async with bench(GateEngine(capacity=4), cancels=url) as it:
        message_id = await it.send("long")
        await until(lambda: it.engine.started)
        await until(lambda: stores[-1].listed)
        await cancel(url, [message_id])
        assert (await it.responses_until(1))[0]["status_code"] == 499
        assert stores[-1].whole == []
        stores[-1].gate.set()
        await it.stop()
