"""`rejoinder cancel`, as a user runs it, and the client's call behind it."""

import asyncio
import time
from pathlib import Path

import pytest
from command import rejoinder
from queues import REQUESTS, publish, request

from rejoinder.adapters import BadURL, Denied, Transient, open_blobs
from rejoinder.adapters.cancel_marks import before, mark_key, mark_name, marks_url, name_of
from rejoinder.client.cancel import cancel, cancels_of

BESIDE = "work.db.cancels"


def test_ids_from_the_line_and_from_stdin_leave_marks_beside_the_queue(tmp_path: Path) -> None:
    ids = publish(tmp_path, REQUESTS, *map(request, range(3)))
    done = rejoinder("cancel", "--requests", REQUESTS, "-", "doc 17", cwd=tmp_path, stdin="\r\n\n".join(ids).encode())
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr.decode() == f"left 4 marks in file://{tmp_path}/{BESIDE}/\n"
    found = {name_of(path.name): path.read_text() for path in (tmp_path / BESIDE).iterdir()}
    assert sorted(found.values()) == sorted([*ids, "doc 17"])
    assert set(ids) < set(found), "what may be a file's name is one"


@pytest.mark.parametrize("more", [[], ["--blobs", "s3://bucket/jobs"]])
def test_a_queue_that_is_not_there_is_a_slip_of_the_name(tmp_path: Path, more: list[str]) -> None:
    done = rejoinder("cancel", "--requests", "sqlite:///wrok.db?queue=requests", *more, "one", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"there is no queue in 'sqlite:///wrok.db?queue=requests': its file does not exist" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "place"),
    [
        (["--cancels", "{}/marks"], "marks"),
        (["--blobs", "{}/blobs"], "blobs/cancels"),
        (["--blobs", "{}/blobs", "--requests", REQUESTS], BESIDE),
        (["--cancels", "{}/marks", "--requests", "sqlite:///no.db?queue=requests"], "marks"),
        (["--blobs", "{}/blobs", "--cancels", "{}/marks"], "marks"),
        (["--requests", "awssqs:///queue?region=us-east-1", "--blobs", "{}/blobs"], "blobs/cancels"),
    ],
)
def test_the_store_is_the_one_that_a_worker_with_these_settings_has(
    tmp_path: Path, args: list[str], place: str
) -> None:
    publish(tmp_path, REQUESTS, request(0))
    done = rejoinder("cancel", *[arg.format(f"file://{tmp_path}") for arg in args], "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(b"left 1 mark in ")
    assert [name_of(path.name) for path in (tmp_path / place).iterdir()] == ["one"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["one"], "nothing says where cancel marks are: name the workers' store of them (cancels), or their blobs"),
        (["--requests", "awssqs:///q?region=r", "one"], "does not say where cancel marks are"),
        (["--requests", "memory://q", "one"], "is inside this process"),
        (["--requests", "sqlite:///q.db", "one"], "parameter 'queue' is missing"),
        (["--cancels", "ftp://x/y", "one"], "unknown scheme 'ftp'"),
        (["--cancels", "file://{}/x", ""], "an id is 1 to 1024 characters of text, not ''"),
        (["--cancels", "file://{}/x", "x" * 1025], "an id is 1 to 1024 characters of text"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path: Path, args: list[str], words: str) -> None:
    done = rejoinder("cancel", *[arg.format(tmp_path) for arg in args], cwd=tmp_path)
    assert done.returncode == 2
    said = done.stderr.decode()
    assert words in said
    assert said.startswith("rejoinder cancel: ")
    assert said.count("\n") == 1


def test_a_store_that_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = rejoinder("cancel", "--cancels", f"file://{tmp_path}/file", "one", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(b"rejoinder cancel: ")
    assert done.stderr.count(b"\n") == 1


def test_stdin_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    done = rejoinder("cancel", "--cancels", f"file://{tmp_path}/m", "-", cwd=tmp_path, stdin=b"\xff\n")
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"stdin is not UTF-8" in done.stderr


async def test_an_id_that_is_marked_gets_a_new_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rejoinder.adapters.file_store import FileStore

    async def refused(*_):
        raise AssertionError("the permission to delete is not needed")

    monkeypatch.setattr(FileStore, "remove", refused)
    url = f"file://{tmp_path}/m"
    assert await cancel(url, ["a", "a", "b"]) == 3
    (tmp_path / "m" / "1700000000000-a").write_text("a")
    before = time.time()
    assert await cancel(url, iter(["a"])) == 1
    newest = max(path.name for path in (tmp_path / "m").glob("*-a"))
    assert before - 0.001 <= int(newest.partition("-")[0]) / 1000 <= time.time()
    assert (tmp_path / "m" / newest).stat().st_mtime >= before - 1


async def test_many_marks(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/m"
    assert await cancel(url, (f"id-{number}" for number in range(3000))) == 3000
    async with open_blobs(url) as store:
        assert {name_of(one.key) async for one in store.list()} == {f"id-{number}" for number in range(3000)}


async def test_a_bad_id_among_good_ones_is_said_and_leaves_no_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an id is"):
        await cancel(f"file://{tmp_path}/m", ["a", "b", "\ud800", "c"])
    assert len(asyncio.all_tasks()) == 1


async def test_one_string_is_not_taken_for_its_characters(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="give a list of ids"):
        await cancel(f"file://{tmp_path}/m", "doc-17")
    assert not (tmp_path / "m").exists()


async def test_a_store_that_is_away_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rejoinder.adapters.file_store import FileStore

    real, faults = FileStore.put, [Transient("away"), Transient("away")]

    async def put(self, *args):
        if faults:
            raise faults.pop()
        return await real(self, *args)

    monkeypatch.setattr(FileStore, "put", put)
    assert await cancel(f"file://{tmp_path}/m", ["a", "b"]) == 2
    assert sorted(path.name.partition("-")[2] for path in (tmp_path / "m").iterdir()) == ["a", "b"]
    faults.append(Denied("no"))
    with pytest.raises(Denied):
        await cancel(f"file://{tmp_path}/m", ["c"])


def test_where_marks_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.db").symlink_to(tmp_path / "real.db")
    real = f"file://{tmp_path}/real.db.cancels/"
    for url in ("sqlite:///real.db?queue=a", f"sqlite:///{tmp_path}/real.db?queue=b", "sqlite:///link.db?queue=a"):
        assert cancels_of(requests=url) == real
    unnamed = "sqlite:///a%3Fb.db?queue=a"
    assert marks_url(unnamed, None, None) is None, "no store's URL can name it"
    assert marks_url(unnamed, None, "s3://b/p") == "s3://b/p/cancels"
    assert marks_url("sqlite:///real.db?queue=a", None, "s3://b/p") == real
    assert marks_url("memory://q?lease=3", None, None) == "memory://q/cancels"
    assert marks_url("memory://q?lease=3", None, "s3://b/p") == "memory://q/cancels"
    assert marks_url(None, None, "s3://b/p") == "s3://b/p/cancels"
    assert marks_url("awssqs:///q?region=r", None, None) is None
    options = "s3://b/p?region=r"
    assert marks_url("awssqs:///q?region=r", None, options) == "s3://b/p/cancels?region=r"
    assert marks_url("sqlite:///a.db?queue=a", "gs://b/c", options) == "gs://b/c"
    with pytest.raises(BadURL, match="queue"):
        marks_url("sqlite:///a.db", None, None)


@pytest.mark.parametrize(
    "request_id", ["doc-17", "a.b_c", "1-2-3", "doc 17", "é", "x" * 1024, ".hidden", "1700000000000-a"]
)
def test_a_key_has_its_time_and_a_name(request_id: str) -> None:
    key = mark_key(request_id, 1.7e9)
    assert key.startswith("1700000000000-")
    assert name_of(key) == mark_name(request_id)
    assert before(1.7e9 - 0.001) < before(1.7e9) < key < before(1.7e9 + 0.001)
    assert mark_key(request_id, 0.0) < mark_key(request_id, 999_999_999.999) < key


@pytest.mark.parametrize(
    "key", ["doc-17", "1700000000000", "1700000000000-", "170000000000-a", "17000000000000-a", "170000000000x-a"]
)
def test_what_is_no_key_of_a_mark(key: str) -> None:
    assert name_of(key) is None
    assert name_of(f"dir/{mark_key('a', 1.7e9)}") is None
    assert name_of("1700000000000-a b") is None
    assert name_of("1700000000000-a/b") is None
    assert name_of("１７００００００００００００-a") is None
