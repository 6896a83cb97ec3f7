"""What only a directory has: links, special files, permissions, file systems without what we would like."""

import asyncio
import gc
import os
import socket
import sys
from pathlib import Path

import pytest

from rejoinder.adapters import Denied, NotFound, Transient, file_objects, open_blobs


@pytest.fixture
async def store(tmp_path):
    async with open_blobs(f"file://{tmp_path}/root") as store:
        yield store


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


async def stream(*chunks: bytes):
    for chunk in chunks:
        yield chunk


async def content_of(store, key):
    async with store.read(key) as blob:
        return b"".join([chunk async for chunk in blob.chunks])


def descriptors() -> set[str]:
    """Those of the process: what an earlier test has left to the collector may go meanwhile."""
    gc.collect()
    return {one.name for one in Path("/proc/self/fd").iterdir()}


async def test_reading_makes_nothing(store, tmp_path):
    assert not await store.exists("a/b")
    with pytest.raises(NotFound):
        await content_of(store, "a/b")
    assert list(tmp_path.iterdir()) == []
    assert await store.put("a/b", stream(b"x"), "t")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["root", "root/a", "root/a/b"]


@pytest.mark.parametrize("below", ["", "/a/b"])
async def test_a_directory_that_cannot_be_is_denied(tmp_path, below):
    (tmp_path / "file").write_text("x")
    async with open_blobs(f"file://{tmp_path}/file{below}") as store:
        for call in (store.exists("k"), store.put("k", stream(b"x"), "t"), content_of(store, "k")):
            with pytest.raises(Denied):
                await call


@pytest.mark.parametrize("make_target", [True, False], ids=["there", "dangling"])
async def test_links_that_lead_out_are_denied(store, root, tmp_path, make_target):
    outside = tmp_path / "outside"
    outside.mkdir()
    if make_target:
        (outside / "secret").write_text("secret")
    (root / "file").symlink_to(outside / "secret")
    (root / "dir").symlink_to(outside)
    (root / "up").symlink_to("../outside")
    (root / "twice").symlink_to("dir/secret")
    (root / "beside").symlink_to(f"{root}-beside/secret")
    (tmp_path / "root-beside").mkdir()
    for key in ("file", "dir/secret", "up/secret", "twice", "beside", "dir/new/deep"):
        for call in (store.exists(key), store.put(key, stream(b"x"), "t"), content_of(store, key)):
            with pytest.raises(Denied, match="leads out"):
                await call
    assert sorted(path.name for path in outside.iterdir()) == (["secret"] if make_target else [])
    assert list((tmp_path / "root-beside").iterdir()) == []


async def test_links_that_stay_inside_are_followed(store, root):
    (root / "real").mkdir()
    (root / "real/x").write_text("x")
    (root / "link").symlink_to("real")
    (root / "absolute").symlink_to(root / "real" / "x")
    assert await content_of(store, "link/x") == await content_of(store, "absolute") == b"x"
    assert await store.put("link/y", stream(b"y"), "t")
    assert (root / "real/y").read_text() == "y"


async def test_the_root_itself_may_be_a_link(store, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root").symlink_to("elsewhere")
    assert await store.put("a/x", stream(b"x"), "t")
    assert await content_of(store, "a/x") == b"x"


async def test_a_loop_of_links_is_denied(store, root):
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    for call in (store.exists("a"), store.put("a", stream(b"x"), "t"), content_of(store, "a")):
        with pytest.raises(Denied):
            await call
    with pytest.raises(NotFound):
        await content_of(store, "a/x")


async def test_special_files_are_denied_and_never_waited_for(store, root, monkeypatch):
    os.mkfifo(root / "pipe")
    (root / "null").symlink_to("/dev/null")
    monkeypatch.chdir(root)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        async with asyncio.timeout(30):
            for key in ("pipe", "null", "socket"):
                for call in (store.exists(key), store.put(key, stream(b"x"), "t"), content_of(store, key)):
                    with pytest.raises(Denied):
                        await call


async def test_a_directory_is_no_object(store, root):
    (root / "dir").mkdir()
    assert not await store.exists("dir")
    with pytest.raises(NotFound):
        await content_of(store, "dir")
    with pytest.raises(Denied, match="is a directory"):
        await store.put("dir", stream(b"x"), "t")


async def test_an_object_is_no_directory(store):
    assert await store.put("a", stream(b"x"), "t")
    assert not await store.exists("a/b")
    with pytest.raises(NotFound):
        await content_of(store, "a/b")
    with pytest.raises(Denied):
        await store.put("a/b", stream(b"x"), "t")


async def test_a_name_that_no_file_can_have(store):
    assert not await store.exists("k" * 256)
    with pytest.raises(Denied, match="File name too long"):
        await store.put("k" * 256, stream(b"x"), "t")


async def test_a_file_that_is_cut_off_is_noticed(store, root):
    (root / "k").write_bytes(b"x" * (3 << 20))
    async with store.read("k") as blob:
        await anext(blob.chunks)
        os.truncate(root / "k", 5)
        with pytest.raises(Transient, match="was cut off"):
            async for _ in blob.chunks:
                pass


async def test_a_full_disk_is_transient(store, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(Transient, match="No space left"):
        await store.put("k", stream(b"x"), "t")
    monkeypatch.undo()
    assert await store.put("k", stream(b"x"), "t")


async def test_no_descriptor_is_left_open(store):
    await store.put("k", stream(b"x"), "t")
    before = descriptors()
    for _ in range(20):
        await store.put("k", stream(b"x"), "t")
        async with store.read("k"):
            pass
        with pytest.raises(NotFound):
            await content_of(store, "none/at/all")
        with pytest.raises(Denied):
            await store.put("k/x", stream(b"x"), "t")
    assert not descriptors() - before


KILLED = """
import asyncio, sys
from rejoinder.adapters import file_objects, open_blobs

async def chunks():
    yield b"half" * 1_000_000
    print("taken", flush=True)
    await asyncio.Event().wait()

async def main():
    file_objects.TMPFILE = None
    async with open_blobs(sys.argv[1]) as store:
        await store.put("k", chunks(), "t")

asyncio.run(main())
"""


class TestWithoutUnnamedFiles:
    """As on file systems that have no O_TMPFILE, and on other systems than Linux."""

    @pytest.fixture(autouse=True)
    def _without(self, monkeypatch):
        monkeypatch.setattr(file_objects, "TMPFILE", None)

    async def test_of_puts_at_once_one_writes(self, store, root):
        contents = [b"%d" % number * 3_000_000 for number in range(8)]
        written = await asyncio.gather(*[store.put("k", stream(content), "t") for content in contents])
        assert sorted(written) == [False] * 7 + [True]
        assert await content_of(store, "k") == contents[written.index(True)]
        assert [path.name for path in root.iterdir()] == ["k"]

    async def test_what_a_killed_put_left_is_removed_by_the_next(self, store, root):
        peer = await asyncio.create_subprocess_exec(
            sys.executable, "-c", KILLED, store.url, stdout=asyncio.subprocess.PIPE
        )
        assert await peer.stdout.readline() == b"taken\n"
        (left,) = root.iterdir()
        assert not await store.exists("k")
        with pytest.raises(Denied, match="what is being written"):
            await content_of(store, left.name)
        assert await store.put("other", stream(b"y"), "t")
        assert left.exists()
        assert await store.put("k2", stream(b"x"), "t")
        peer.kill()
        await peer.communicate()
        assert await store.put("k", stream(b"x"), "t")
        assert sorted(path.name for path in root.iterdir()) == ["k", "k2", "other"]

    async def test_a_living_writer_is_left_alone(self, store, root):
        first, go = asyncio.Event(), asyncio.Event()

        async def slow():
            yield b"x" * (2 << 20)
            first.set()
            await go.wait()

        putting = asyncio.create_task(store.put("k", slow(), "t"))
        await first.wait()
        assert await store.put("k", stream(b"fast"), "t") is True
        go.set()
        assert await putting is False
        assert await content_of(store, "k") == b"fast"
        assert [path.name for path in root.iterdir()] == ["k"]


async def test_a_listing_follows_no_link_and_has_files_alone(store, root, tmp_path):
    await store.put("dir/k", stream(b"x"), "text/plain")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"x")
    (root / "out").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to(root)
    (root / "k").symlink_to(root / "dir" / "k")
    (root / "empty").mkdir()
    (root / ".rejoinder-put-0-0").write_bytes(b"x")
    os.mkfifo(root / "pipe")
    (root / "a\nb").write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff")).write_bytes(b"x")
    assert [one.key async for one in store.list()] == ["dir/k"]


async def test_removing_leaves_directories_and_what_links_lead_to_outside(store, root, tmp_path):
    await store.put("dir/k", stream(b"x"), "text/plain")
    (tmp_path / "secret").write_bytes(b"x")
    (root / "link").symlink_to(tmp_path / "secret")
    await store.remove("dir")
    with pytest.raises(Denied):
        await store.remove("link")
    assert (tmp_path / "secret").exists()
    assert await store.exists("dir/k")


async def test_a_listing_that_is_left_early_leaves_no_descriptor(store, root):
    for number in range(30):
        await store.put(f"{number}/{number}/k", stream(b"x"), "text/plain")
    before = descriptors()
    listing = store.list()
    await anext(listing)
    await listing.aclose()
    assert not descriptors() - before
