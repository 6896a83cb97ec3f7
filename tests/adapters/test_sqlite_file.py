"""The SQLite file: whose it is, who may read it, and what happens when it is not there or not ours."""

import asyncio
import os
import sqlite3
import sys

import pytest

from rejoinder.adapters import AdapterError, NotFound, Outgoing, Transient, open_subscription, open_topic
from rejoinder.adapters.sqlite_file import APPLICATION_ID, SCHEMA_VERSION


async def refusal(path):
    """Open a queue in `path` and give the error, which must name the file."""
    with pytest.raises(AdapterError) as info:
        async with open_subscription(f"sqlite:///{path}?queue=q"):
            pass
    assert str(path) in str(info.value)
    return info.value


async def test_a_missing_directory_is_not_found(tmp_path):
    error = await refusal(tmp_path / "no" / "q.db")
    assert isinstance(error, NotFound)
    assert "no directory" in str(error)


async def test_a_directory_is_no_queue(tmp_path):
    assert "is a directory" in str(await refusal(tmp_path))


async def test_another_kind_of_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "q.db"
    path.write_text("precious\n" * 1000)
    assert "not an SQLite database" in str(await refusal(path))
    assert path.read_text() == "precious\n" * 1000


@pytest.mark.parametrize(
    "statement", ["CREATE TABLE theirs (x)", "PRAGMA application_id = 7", "PRAGMA user_version = 7"]
)
async def test_another_programs_database_is_refused_and_left_alone(tmp_path, statement):
    path = tmp_path / "q.db"
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.close()
    before = path.read_bytes()
    assert "another program" in str(await refusal(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize(("version", "advice"), [(SCHEMA_VERSION + 1, "upgrade Rejoinder"), (0, "no released")])
async def test_another_schema_version_is_refused(tmp_path, version, advice):
    path = tmp_path / "q.db"
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    error = str(await refusal(path))
    assert advice in error
    assert f"schema version {version}" in error


async def test_an_empty_file_becomes_a_queue(tmp_path):
    (tmp_path / "q.db").touch()
    async with open_topic(f"sqlite:///{tmp_path}/q.db?queue=q") as topic:
        assert [isinstance(one, str) for one in await topic.publish([Outgoing(b"x")])] == [True]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
async def test_files_are_private_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        async with open_topic(f"sqlite:///{tmp_path}/q.db?queue=q") as topic:
            await topic.publish([Outgoing(b"x")])
            modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes == {"q.db": 0o600, "q.db-wal": 0o600, "q.db-shm": 0o600}


@pytest.mark.parametrize("mode", [0o000, 0o444])
async def test_another_users_file_is_denied(tmp_path, mode):
    path = tmp_path / "q.db"
    async with open_topic(f"sqlite:///{path}?queue=q"):
        pass
    path.chmod(mode)
    # root may read everything, so it tries as somebody else, from a directory that is open to all
    script = f"""
import asyncio, os
from rejoinder.adapters import Denied, open_topic
import rejoinder.adapters.sqlite
os.chdir({str(tmp_path)!r})
async def main():
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        async with open_topic("sqlite:///q.db?queue=q"):
            print("opened")
    except Denied as exc:
        print("denied", exc)
asyncio.run(main())
"""
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == os.getuid() and not directory.stat().st_mode & 0o001:
            directory.chmod(0o755)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert output.startswith(b"denied")
    assert b"q.db" in output


async def test_many_create_one_file_at_once(tmp_path):
    script = f"""
import asyncio
from rejoinder.adapters import Outgoing, open_topic
async def main():
    async with open_topic("sqlite:///{tmp_path}/q.db?queue=q") as topic:
        print(*await topic.publish([Outgoing(b"x")]))
asyncio.run(main())
"""
    spawn = [
        asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE) for _ in range(8)
    ]
    processes = await asyncio.gather(*spawn)
    ids = [(await process.communicate())[0].decode().strip() for process in processes]
    assert len(set(ids)) == 8
    assert {one.partition("-")[0] for one in ids} == {ids[0].partition("-")[0]}
    async with open_subscription(f"sqlite:///{tmp_path}/q.db?queue=q") as subscription:
        assert {message.id for message in await subscription.receive(99, 0)} == set(ids)


async def test_a_recreated_file_gives_other_ids_and_another_name(tmp_path):
    seen = []
    for _ in range(2):
        async with open_topic(f"sqlite:///{tmp_path}/q.db?queue=q") as topic:
            seen.append((topic.name, *await topic.publish([Outgoing(b"x")])))
        (tmp_path / "q.db").unlink()
    assert not set(seen[0]) & set(seen[1])


@pytest.mark.parametrize("replace", [False, True])
async def test_a_removed_file_is_noticed(tmp_path, replace):
    path = tmp_path / "q.db"
    url = f"sqlite:///{path}?queue=q"
    async with open_topic(url) as topic, open_subscription(url) as subscription:
        receiving = asyncio.create_task(subscription.receive(1, 60))
        await topic.publish([])
        path.unlink()
        if replace:
            path.touch()
        with pytest.raises(NotFound, match="removed or replaced"):
            await receiving
        (outcome,) = await topic.publish([Outgoing(b"x")])
        assert isinstance(outcome, NotFound)


async def test_a_full_disk_is_transient_and_loses_nothing(tmp_path):
    """The kernel refuses to let files grow, as a full disk or a quota would, and then allows it again."""
    script = f"""
import asyncio, resource
from rejoinder.adapters import Outgoing, Transient, open_subscription, open_topic
url = "sqlite:///{tmp_path}/q.db?queue=q"
async def main():
    async with open_topic(url) as topic, open_subscription(url) as subscription:
        print(type((await topic.publish([Outgoing(b"first")]))[0]).__name__)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        outcomes = await asyncio.gather(topic.publish([Outgoing(bytes(10**6))]), topic.publish([Outgoing(b"small")]))
        print(*(type(outcome[0]).__name__ for outcome in outcomes))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        print(type((await topic.publish([Outgoing(bytes(10**6))]))[0]).__name__)
        print(*(len(message.body) for message in await subscription.receive(9, 0)))
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert output.decode().splitlines() == ["str", "Transient Transient", "str", "5 1000000"]


async def test_a_lock_held_too_long_is_transient_and_blocks_nobody_else(tmp_path, monkeypatch):
    monkeypatch.setattr("rejoinder.adapters.sqlite_file.BUSY_SECONDS", 2.0)
    url = f"sqlite:///{tmp_path}/q.db?queue=q"
    other = f"sqlite:///{tmp_path}/other.db?queue=q"
    async with open_topic(url) as topic, open_subscription(url) as subscription, open_topic(other) as elsewhere:
        await topic.publish([Outgoing(b"x")])
        (message,) = await subscription.receive(1, 5)
        locker = sqlite3.connect(tmp_path / "q.db", isolation_level=None)
        locker.execute("BEGIN IMMEDIATE")
        # Looking takes no lock, and there is nothing to receive.
        assert await subscription.receive(1, 0) == []
        assert (await subscription.backlog()).held == 1
        publishing = asyncio.create_task(topic.publish([Outgoing(b"y")]))
        ids = 0
        while not publishing.done():
            ids += isinstance((await elsewhere.publish([Outgoing(b"z")]))[0], str)
        assert ids > 3
        assert isinstance((await publishing)[0], Transient)
        assert "locked" in str((await publishing)[0])
        for outcomes in (await subscription.ack([message]), await subscription.set_lease([message], 0)):
            assert isinstance(outcomes[0], Transient)
        locker.execute("ROLLBACK")
        locker.close()
        assert await subscription.set_lease([message], 0) == [None]
        assert len(await subscription.receive(9, 0)) == 1


async def test_a_lock_held_shortly_is_waited_for(tmp_path):
    url = f"sqlite:///{tmp_path}/q.db?queue=q"
    async with open_topic(url) as topic:
        locker = sqlite3.connect(tmp_path / "q.db", isolation_level=None)
        locker.execute("BEGIN IMMEDIATE")
        publishing = asyncio.create_task(topic.publish([Outgoing(b"y")]))
        done, _ = await asyncio.wait([publishing], timeout=0.1)
        assert not done
        locker.execute("COMMIT")
        locker.close()
        assert isinstance((await publishing)[0], str)
