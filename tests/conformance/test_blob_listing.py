"""Sentences of `BlobStore.list` and `BlobStore.remove`."""

import asyncio
import time

import blob_bench
from blob_bench import KEYS, LONG, content_of, keys_of, nothing_at, put_under_way, stream
from stores import STORES

from rejoinder.adapters import open_blobs

KINDS = STORES
"""What `bench` is in place of a broker."""
bench = blob_bench.bench


async def test_what_was_put_is_listed_until_it_is_removed(bench):
    assert await keys_of(bench.store) == []
    before = time.time()
    for key in KEYS:
        assert await bench.store.put(key, stream(key.encode()), "text/plain")
    listed = [one async for one in bench.store.list()]
    assert sorted(one.key for one in listed) == sorted(KEYS)
    for one in listed:
        # Whole seconds of some stores; and a file system's clock ticks more rarely than ours.
        assert before - 1.5 <= one.modified <= time.time() + 0.1
    for number, key in enumerate(KEYS, 1):
        await bench.store.remove(key)
        assert not await bench.store.exists(key)
        assert await keys_of(bench.store) == sorted(KEYS[number:])


async def test_removing_what_is_not_there_is_no_error(bench):
    await bench.store.remove("a/b/c")
    await bench.store.put("a/b", stream(b"x"), "text/plain")
    for key in ("a", "a/b c", "b", "a/bb"):
        await bench.store.remove(key)
    assert await keys_of(bench.store) == ["a/b"]
    await bench.store.remove("a/b")
    await bench.store.remove("a/b")
    assert await keys_of(bench.store) == []


async def test_what_was_removed_may_be_put_again(bench):
    for content in (b"1", b"2", b"3" * LONG, b"4"):
        assert await bench.store.put("k", stream(content), "text/plain") is True
        assert await content_of(bench.store, "k") == content
        await bench.store.remove("k")
        assert await nothing_at(bench, "k")


async def test_a_listing_is_of_what_is_below_the_prefix(bench):
    async with open_blobs(bench.url + "/below") as below, open_blobs(bench.url + "/below too") as other:
        await bench.store.put("below!", stream(b"x"), "text/plain")
        await below.put("k", stream(b"x"), "text/plain")
        await other.put("k", stream(b"x"), "text/plain")
        assert await keys_of(bench.store) == ["below too/k", "below!", "below/k"]
        assert await keys_of(below) == ["k"]
        assert await keys_of(other) == ["k"]


async def test_what_is_being_written_is_not_listed(bench):
    putting = await put_under_way(bench.store, "dir/k", LONG)
    assert await keys_of(bench.store) == []
    putting.cancel()
    await asyncio.gather(putting, return_exceptions=True)


async def test_more_objects_than_one_answer_has(bench, monkeypatch):
    monkeypatch.setattr("rejoinder.adapters.s3_store.PAGE", 7)
    monkeypatch.setattr("rejoinder.adapters.gcs_store.PAGE", 7)
    monkeypatch.setattr("rejoinder.adapters.file_store.LISTED_AT_ONCE", 7)
    keys = [f"{number % 3}/{number:03} é+%2F" if number % 2 else f"{number:03}" for number in range(50)]
    await asyncio.gather(*[bench.store.put(key, stream(b"x"), "text/plain") for key in keys])
    assert await keys_of(bench.store) == sorted(keys)
    listing = bench.store.list()
    assert (await anext(listing)).key in keys
    await listing.aclose()
    # What is removed as it is listed: nothing else is left out for it.
    async for one in bench.store.list():
        await bench.store.remove(one.key)
    assert await keys_of(bench.store) == []


async def test_a_listing_of_what_is_after(bench, monkeypatch):
    monkeypatch.setattr("rejoinder.adapters.s3_store.PAGE", 2)
    monkeypatch.setattr("rejoinder.adapters.gcs_store.PAGE", 2)
    keys = sorted(["1", "10-a", "10-b/c", "10-b/d é", "10-b0", "2", "A", "a/b", "é/日本/🙂", "\uffee", "🙂", "~ %2F+"])
    await asyncio.gather(*[bench.store.put(key, stream(b"x"), "text/plain") for key in keys])
    for after in (*keys, "", "0", "10", "10-", "10-b", "10-b/", "10-b/c ", "10-c", "/", "~", "日", "🙂"):
        assert sorted([one.key async for one in bench.store.list(after)]) == [key for key in keys if key > after], after


async def test_removals_at_once(bench):
    keys = [f"k{number}" for number in range(40)]
    await asyncio.gather(*[bench.store.put(key, stream(b"x"), "text/plain") for key in keys])
    await asyncio.gather(*[bench.store.remove(key) for key in keys * 2])
    assert await keys_of(bench.store) == []
