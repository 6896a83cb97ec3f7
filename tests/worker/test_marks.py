"""How a worker looks for marks: what a listing costs, which clocks it bears, what it forgets, and what it removes."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from worker_harness import GateEngine, bench, until

from rejoinder.adapters import Denied, Transient, open_blobs
from rejoinder.adapters.cancel_marks import mark_key, name_of
from rejoinder.adapters.driver import Listed
from rejoinder.adapters.memory import fresh_url
from rejoinder.client.cancel import cancel
from rejoinder.worker import marks as marks_module
from rejoinder.worker.marks import Marks

FAR = marks_module.FAR


class Store:
    """A real store that tells how many objects were listed, and whose listings of everything can be held up."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.listed: list[int] = []
        """Objects of each listing that is over, but of those of everything."""
        self.whole: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def list(self, after: str = "") -> AsyncGenerator[Listed, None]:
        count = 0
        async for one in self.inner.list(after):
            count += 1
            yield one
        if not after:
            await self.gate.wait()
        (self.listed if after else self.whole).append(count)


@asynccontextmanager
async def looking() -> AsyncIterator[tuple[Marks, Store]]:
    async with open_blobs(fresh_url()) as inner:
        store = Store(inner)
        marks = Marks(store, lambda: None)  # type: ignore[arg-type]
        try:
            yield marks, store
        finally:
            await marks.close()


async def leave(store: Any, name: str, at: float | None = None) -> str:
    """Leave a mark, by a clock that says `at`."""

    async def content() -> AsyncIterator[bytes]:
        yield name.encode()

    key = mark_key(name, time.time() if at is None else at)
    assert await store.put(key, content(), "text/plain")
    return key


async def keys_of(store: Any) -> set[str]:
    return {one.key async for one in store.inner.list()}


async def until_all(store: Store, count: int) -> None:
    """Until so many listings of everything are over, and what they bring has been dealt with."""
    await until(lambda: len(store.whole) >= count)
    for _ in range(10):
        await asyncio.sleep(0)


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
async def test_a_clock_may_be_behind_or_ahead(behind: float) -> None:
    async with looking() as (marks, store):
        for _ in range(3):
            await marks.look()
        await until_all(store, 1)
        await leave(store, "a", time.time() - behind)
        await marks.look()
        assert "a" in marks.known
        assert store.whole == [0]


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


async def test_what_was_left_in_a_long_pause_is_new() -> None:
    async with looking() as (marks, store):
        await marks.look()
        await until_all(store, 1)
        marks._since = dict.fromkeys(marks._since, time.time() - 86_400)
        await leave(store, "a", time.time() - 80_000)
        await marks.look()
        assert "a" in marks.known


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


async def test_what_others_removed_is_forgotten_and_what_came_meanwhile_is_not() -> None:
    async with looking() as (marks, store):
        gone = await leave(store, "gone", time.time() - 3600)
        again = await leave(store, "again", time.time() - 3600)
        await leave(store, "stays", time.time() - 3600)
        await marks.look()
        await until_all(store, 1)
        assert set(marks.known) == {"gone", "again", "stays"}
        await store.remove(gone)
        await store.remove(again)
        store.gate.clear()
        marks._all_due = 0.0
        await marks.look()
        await leave(store, "new")
        await leave(store, "again")
        await marks.look()
        store.gate.set()
        await until_all(store, 2)
        assert set(marks.known) == {"again", "stays", "new"}


@pytest.mark.parametrize("ago", [0.0, 60.0])
async def test_what_others_have_just_removed_is_forgotten_at_once(ago: float) -> None:
    """Its `inference_id` may be used again, within the minute by which clocks may differ."""
    async with looking() as (marks, store):
        other = Marks(store, lambda: None)  # type: ignore[arg-type]
        await leave(store, "gone", time.time() - ago)
        await leave(store, "again", time.time() - ago)
        stays = await leave(store, "stays", time.time() - ago)
        for one in (marks, other):
            await one.look()
        await until_all(store, 2)
        for name in ("gone", "again"):
            other.remove(name, 0.0)
        await until(lambda: not other._removing)
        again = await leave(store, "again")
        marks._far_due = 0.0
        await marks.look()
        assert {name: one.key for name, one in marks.known.items()} == {"stays": stays, "again": again}
        marks.remove("again", 0.0)
        await until(lambda: not marks._removing)
        assert await keys_of(store) == {stays}
        assert len(store.whole) == 2
        await other.close()


async def test_what_others_removed_is_forgotten_where_only_the_newest_are_listed() -> None:
    async with looking() as (marks, store):
        before_it = await leave(store, "before")
        await marks.look()
        await until_all(store, 1)
        marks._far_due = marks._clock() + 3600
        after_it = await leave(store, "after")
        await marks.look()
        assert set(marks.known) == {"before", "after"}
        await store.remove(before_it)
        await marks.look()
        assert set(marks.known) == {"after"}
        await store.remove(after_it)
        # Meanwhile it is too old for those listings, and not for the next that goes far back.
        marks._since[marks_module.NEAR] = time.time() + marks_module.NEAR + 1
        marks._found[marks_module.NEAR] = set()
        marks._far_due = 0.0
        await marks.look()
        assert marks.known == {}


@pytest.mark.parametrize("everything", [False, True])
async def test_of_several_marks_those_that_stand_are_known(everything: bool) -> None:
    async with looking() as (marks, store):
        keys = [await leave(store, "a", time.time() - 60 + number) for number in range(4)]
        await marks.look()
        await until_all(store, 1)
        for removed, newest in ((3, 2), (1, 2), (2, 0), (0, None)):
            await store.remove(keys[removed])
            marks._far_due = math.inf if everything else 0.0
            marks._all_due = 0.0 if everything else math.inf
            await marks.look()
            await until(lambda: not marks._is_listing_all)
            assert [one.key for one in marks.known.values()] == ([] if newest is None else [keys[newest]])
        assert marks._others == {}


async def test_a_name_has_all_its_marks_removed_and_the_newest_counts() -> None:
    async with looking() as (marks, store):
        for number in range(5):
            await leave(store, "a", time.time() - 3600 + number)
        other = await leave(store, "b")
        await marks.look()
        await until_all(store, 1)
        newest = await leave(store, "a")
        await marks.look()
        await marks.look()
        assert marks.known["a"].key == newest
        marks.remove("a", 0.0)
        await until(lambda: not marks._removing)
        assert await keys_of(store) == {other}
        await marks.look()
        assert set(marks.known) == {"b"}
        assert marks._others == {}


async def test_what_is_removed_while_it_is_listed_stays_forgotten() -> None:
    async with looking() as (marks, store):
        await leave(store, "a", time.time() - 3600)
        await marks.look()
        await until_all(store, 1)
        marks._all_due = 0.0
        found: list[Listed] = [one async for one in store.inner.list()]

        async def late(_after: str) -> AsyncGenerator[Listed, None]:
            await store.gate.wait()
            for one in found:
                yield one

        store.gate.clear()
        store.inner = SimpleNamespace(list=late, remove=store.inner.remove, url="memory://late")
        looks = asyncio.create_task(marks.look())
        await asyncio.sleep(0)
        marks.remove("a", 0.0)
        await until(lambda: not marks._removing)
        store.gate.set()
        await looks
        await until_all(store, 2)
        assert marks.known == {}


async def test_a_removal_of_nothing_does_not_say_that_removing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = structlog.testing.CapturingLogger()
    monkeypatch.setattr(marks_module, "log", logger)
    async with looking() as (marks, store):
        await leave(store, "a")
        await marks.look()
        real = store.inner

        async def denied(_key: str) -> None:
            raise Denied("no s3:DeleteObject")

        store.inner = SimpleNamespace(list=real.list, remove=denied, url=real.url)
        for _ in range(3):
            for name in ("a", "nobody"):
                marks.remove(name, 0.0)
                await until(lambda: not marks._removing)
        assert [call.args[0] for call in logger.calls] == ["cancel_marks_trouble"]
        store.inner = real
        marks.remove("a", 0.0)
        await until(lambda: not marks._removing)
        assert [call.args[0] for call in logger.calls] == ["cancel_marks_trouble", "cancel_marks_again"]


async def test_objects_that_are_no_marks_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks_module, "OLD", -60.0)  # everything is old
    async with looking() as (marks, store):
        await leave(store, "a")
        for key in ("notes.txt", "1700000000000", "1700000000000-a b", "dir/1700000000000-a", "é"):
            await store.put(key, _nothing(), "text/plain")
        await marks.look()
        await until(lambda: not marks._is_listing_all)
        assert marks.known == {}
        assert await keys_of(store) == {"notes.txt", "1700000000000", "1700000000000-a b", "dir/1700000000000-a", "é"}


async def _nothing() -> AsyncIterator[bytes]:
    yield b""


async def test_one_id_may_be_marked_very_often() -> None:
    async with looking() as (marks, store):
        began = time.time() - 3600
        for number in range(20_000):
            await leave(store, "a", began + number / 1000)
        for _ in range(3):
            marks._all_due = 0.0
            await marks.look()
            await until(lambda: not marks._is_listing_all)
        assert name_of(marks.known["a"].key) == "a"
        assert len(marks._others["a"]) == 19_999


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
