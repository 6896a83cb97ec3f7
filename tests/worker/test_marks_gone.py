"""What a worker forgets of the marks that it knows, and what it removes."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from types import SimpleNamespace

import pytest
import structlog
from marks_harness import keys_of, leave, looking, until_all
from virtual_time import virtually
from worker_harness import until

from rejoinder.adapters import Denied
from rejoinder.adapters.cancel_marks import name_of
from rejoinder.adapters.driver import Listed
from rejoinder.worker import marks as marks_module
from rejoinder.worker.marks import Marks


@virtually
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
@virtually
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


@virtually
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
@virtually
async def test_of_several_marks_those_that_stand_are_known(everything: bool) -> None:
    async with looking() as (marks, store):
        keys = []
        for number in range(4):
            keys.append(await leave(store, "a", time.time() - 60 + number))
            await asyncio.sleep(1)
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


@virtually
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


@virtually
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


@virtually
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


@virtually
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


@virtually
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
