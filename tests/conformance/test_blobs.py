"""Sentences of `BlobStore`."""

import asyncio
import random
import sys
import tracemalloc
from pathlib import Path

import blob_bench
import pytest
from blob_bench import KEYS, LONG, MIB, content_of, keys_of, nothing_at, put_under_way, stream
from needs import needs
from stores import STORES

from rejoinder.adapters import NotFound, open_blobs

NO_KEYS = [
    "",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "../a",
    "a/./b",
    "a\nb",
    "\0",
    "a\x7f",
    "\x85",
    "\ud800",
    "k" * 1025,
]


KINDS = STORES
"""What `bench` is in place of a broker."""
bench = blob_bench.bench


@pytest.mark.parametrize("size", [0, 1, 100_000, MIB, 8 * MIB - 1, 8 * MIB, 16 * MIB, LONG])
async def test_what_was_put_is_read(bench, size):
    content = random.Random(size).randbytes(size)
    assert await nothing_at(bench, "k")
    assert await bench.store.put("k", stream(content), "application/x-thing") is True
    assert await bench.store.exists("k") is True
    async with bench.store.read("k") as blob:
        assert blob.size == size
        assert blob.content_type == ("application/x-thing" if bench.kind.keeps_content_type else None)
        got = [chunk async for chunk in blob.chunks]
    assert b"".join(got) == content
    assert max(map(len, got), default=0) <= 8 * MIB
    assert await bench.left() == []


async def test_keys_are_what_they_are(bench):
    for key in KEYS:
        assert await bench.store.put(key, stream(key.encode()), "text/plain") is True
    for key in KEYS:
        assert await content_of(bench.store, key) == key.encode()
        assert bench.store.location(key) == f"{bench.url}/{key}"
    for other in ("a b/c d", "a+b/c+d", "100%/a/b c", "A", "e\u0301/日本/🙂"):
        assert not await bench.store.exists(other)


async def test_the_longest_key(bench):
    part = "k" * min(bench.kind.longest_part, 1000 - len(bench.url.partition("://")[2].encode()))
    assert await bench.store.put(part, stream(b"x"), "text/plain")
    assert await content_of(bench.store, part) == b"x"


@pytest.mark.parametrize("key", NO_KEYS)
async def test_other_keys_are_refused(bench, key):
    calls = [bench.store.exists, bench.store.remove, lambda key: bench.store.put(key, stream(b"x"), "text/plain")]
    for call in calls:
        with pytest.raises(ValueError, match="not a key"):
            await call(key)
    with pytest.raises(ValueError, match="not a key"):
        async with bench.store.read(key):
            pass
    with pytest.raises(ValueError, match="not a key"):
        bench.store.location(key)


async def test_the_url_is_the_root_of_all_locations(bench):
    assert bench.store.url == bench.url
    async with open_blobs(bench.url + "/") as same, open_blobs(bench.url + "/below") as below:
        assert same.url == bench.url
        assert await bench.store.put("below/k", stream(b"x"), "text/plain")
        assert await content_of(same, "below/k") == await content_of(below, "k") == b"x"
        assert below.location("k") == bench.store.location("below/k")


@pytest.mark.parametrize("size", [10, LONG])
async def test_what_stands_is_not_changed(bench, size):
    assert await bench.store.put("k", stream(b"1" * size), "text/plain") is True
    assert await bench.store.put("k", stream(b"2" * size), "text/other") is False
    assert await bench.store.put("k", stream(b""), "text/other") is False
    assert await content_of(bench.store, "k") == b"1" * size
    assert await bench.left() == []


@pytest.mark.parametrize("size", [10, LONG])
async def test_of_puts_at_once_one_writes(bench, size):
    async with open_blobs(bench.url) as other:
        stores = [bench.store, other] * 4
        written = await asyncio.gather(
            *[store.put("k", stream(b"%d" % number * size), "text/plain") for number, store in enumerate(stores)]
        )
    assert sorted(written) == [False] * 7 + [True]
    assert await content_of(bench.store, "k") == b"%d" % written.index(True) * size
    assert await bench.left() == []


@pytest.mark.parametrize("size", [0, 10, 8 * MIB, LONG])
async def test_chunks_that_raise_leave_nothing(bench, size):
    class Fault(Exception):
        pass

    async def failing():
        async for chunk in stream(b"x" * size):
            yield chunk
        raise Fault

    with pytest.raises(Fault):
        await bench.store.put("k", failing(), "text/plain")
    assert await nothing_at(bench, "k")
    assert await bench.store.put("k", stream(b"whole"), "text/plain") is True
    assert await content_of(bench.store, "k") == b"whole"


@pytest.mark.parametrize("size", [10, 8 * MIB, LONG])
async def test_a_cancelled_put_leaves_nothing(bench, size):
    putting = await put_under_way(bench.store, "k", size)
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert await nothing_at(bench, "k")
    assert await bench.store.put("k", stream(b"whole"), "text/plain") is True


async def test_a_put_cancelled_anywhere_leaves_nothing_or_all(bench):
    for delay in range(12):
        key = f"k{delay}"
        putting = asyncio.create_task(bench.store.put(key, stream(b"x" * 9 * MIB, MIB), "text/plain"))
        for _ in range(2**delay):
            await asyncio.sleep(0)
        putting.cancel()
        putting.cancel()
        await asyncio.gather(putting, return_exceptions=True)
        if await bench.store.exists(key):
            assert await content_of(bench.store, key) == b"x" * 9 * MIB
        assert await bench.left() == []


@needs("across_processes")
@pytest.mark.parametrize("size", [1 << 16, LONG])
@pytest.mark.parametrize("then", [1, LONG])
async def test_a_killed_put_leaves_nothing_after_the_next(bench, size, then):
    script = str(Path(__file__).with_name("blob_peer.py"))
    peer = await asyncio.create_subprocess_exec(
        sys.executable, script, bench.url, "dir/k", str(size), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert peer.stdout
        async with asyncio.timeout(60):
            assert await peer.stdout.readline() == b"taken\n"
        assert not await bench.store.exists("dir/k")
    finally:
        peer.kill()
        await peer.communicate()
    assert not await bench.store.exists("dir/k")
    assert await bench.store.put("dir/k2", stream(b"x"), "text/plain") is True  # another key, which begins the same
    assert await bench.store.put("dir/k", stream(b"y" * then), "text/plain") is True
    assert await content_of(bench.store, "dir/k") == b"y" * then
    assert await bench.left() == []


@needs("holds_parts")
async def test_reading_and_putting_hold_some_parts_of_it(bench):
    await bench.store.put("warm", stream(b"x" * 9 * MIB), "text/plain")
    piece = random.Random(1).randbytes(1 << 16)

    async def long():
        for _ in range(1024):
            yield piece

    tracemalloc.start()
    try:
        assert await bench.store.put("k", long(), "text/plain")
        put_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        async with bench.store.read("k") as blob:
            assert blob.size == 64 * MIB
            seen = 0
            async for chunk in blob.chunks:
                seen += len(chunk)
        read_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen == 64 * MIB
    if bench.kind.service is None:  # a service's memory is in this process too, and is not the store's
        assert put_peak < 40 * MIB
        assert read_peak < 16 * MIB


async def test_a_read_that_is_left_early_lets_go(bench):
    await bench.store.put("k", stream(b"x" * LONG), "text/plain")
    for _ in range(80):  # more than there are connections
        async with bench.store.read("k") as blob:
            async for _ in blob.chunks:
                break
    assert await content_of(bench.store, "k") == b"x" * LONG


async def test_many_at_once(bench):
    async def one(number):
        key, content = f"dir{number % 7}/{number}", b"%d" % number * 1000
        assert await bench.store.put(key, stream(content), "text/plain")
        assert await bench.store.exists(key)
        assert await content_of(bench.store, key) == content

    await asyncio.gather(*map(one, range(100)))


@needs("has_buckets")
async def test_a_store_that_is_not_there(bench):
    scheme, _, rest = bench.url.partition("://")
    async with open_blobs(f"{scheme}://{rest.partition('/')[0]}-not/prefix") as store:
        for call in (
            lambda: store.exists("k"),
            lambda: store.put("k", stream(b"x"), "text/plain"),
            lambda: store.put("k", stream(b"x" * LONG), "text/plain"),
            lambda: content_of(store, "k"),
            lambda: store.remove("k"),
            lambda: keys_of(store),
        ):
            with pytest.raises(NotFound):
                await call()


async def test_no_call_blocks_the_event_loop(bench):
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    await bench.store.put("k", stream(b"x" * 64 * MIB, MIB), "text/plain")
    await content_of(bench.store, "k")
    ticking.cancel()
    if bench.kind.name != "memory":
        # Counted, not timed: each part and each chunk that is read is a step of its own.
        assert ticks > 64
