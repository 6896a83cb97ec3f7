"""What is found out about the embedded brokers."""

from pathlib import Path

import pytest

from rejoinder.adapters import (
    BadURL,
    Checkup,
    Finding,
    Outgoing,
    check_subscription,
    check_topic,
    open_subscription,
    open_topic,
    sqlite_checkup,
)


def by_check(checkup: Checkup) -> dict[str, Finding]:
    found = {finding.check: finding for finding in checkup.findings}
    assert len(found) == len(checkup.findings)
    assert all(finding.todo for finding in checkup.findings if finding.state in {"advice", "fail"})
    return found


async def test_a_good_queue(tmp_path):
    url = f"sqlite:///{tmp_path}/q.db?queue=work&max_attempts=5"
    async with open_topic(url) as topic:
        await topic.publish([Outgoing(b"x")] * 3)
    checkup = await check_subscription(url)
    found = by_check(checkup)
    assert {name for name, finding in found.items() if finding.state != "ok"} <= {"disk", "disk space"}
    assert found["messages"].fact == "3 waiting, 0 held or delayed"
    assert (checkup.max_attempts, checkup.max_body) == (5, 64 * 1024 * 1024)
    async with open_subscription(url) as subscription:
        assert [message.attempt for message in await subscription.receive(9, 0)] == [1, 1, 1]  # nothing was touched


async def test_what_to_do(tmp_path):
    found = by_check(await check_subscription(f"sqlite:///{tmp_path}/q.db?queue=work&lease=5"))
    assert (found["lease"].state, found["lease"].todo) == ("advice", "set lease=60 in the URL")
    assert (found["dead-letter policy"].state) == "advice"
    assert "max_attempts=5" in found["dead-letter policy"].todo
    found = by_check(await check_subscription(f"sqlite:///{tmp_path}/q.db?queue=work&lease=900&max_attempts=2"))
    assert found["lease"].state == found["dead-letter policy"].state == "advice"


async def test_a_file_that_is_not_there_is_not_made(tmp_path):
    for check in (check_subscription, check_topic):
        found = by_check(await check(f"sqlite:///{tmp_path}/new.db?queue=work"))
        assert found["reachable"].state == "ok"
    assert list(tmp_path.iterdir()) == []


async def test_no_directory_and_no_database(tmp_path):
    found = by_check(await check_topic(f"sqlite:///{tmp_path}/none/q.db?queue=work"))
    assert found["reachable"].state == "fail"
    assert f"mkdir -p '{tmp_path}/none'" in found["reachable"].todo
    (tmp_path / "q.db").write_bytes(b"this is no database, and it is longer than a header of SQLite would be" * 20)
    found = by_check(await check_subscription(f"sqlite:///{tmp_path}/q.db?queue=work"))
    assert found["reachable"].state == "fail"
    assert "not an SQLite database" in found["reachable"].fact


async def test_dead_letters_are_told(tmp_path):
    url = f"sqlite:///{tmp_path}/q.db?queue=work&max_attempts=1"
    async with open_topic(url) as topic, open_subscription(url) as subscription:
        await topic.publish([Outgoing(b"x")])
        await subscription.set_lease(await subscription.receive(1, 5), 0)
        assert await subscription.receive(1, 0) == []
    found = by_check(await check_subscription(url))
    assert found["dead letters"].state == "advice"
    assert f"rejoinder consume --responses 'sqlite:///{tmp_path}/q.db?queue=work-dead'" in found["dead letters"].todo


async def test_memory_is_of_no_use_to_another_process():
    for check in (check_subscription, check_topic):
        (finding,) = (await check("memory://x")).findings
        assert finding.state == "fail"
        assert "sqlite:///" in finding.todo


@pytest.mark.parametrize("url", ["memory://", "sqlite:///x.db", "nothing://x", "sqlite:///x.db?queue=a&lease=no"])
async def test_a_bad_url_is_raised(url):
    for check in (check_subscription, check_topic):
        with pytest.raises(BadURL):
            await check(url)


MOUNTS = """\
22 27 0:21 / / rw,relatime - ext4 /dev/sda rw
23 22 0:22 / /data rw,relatime shared:1 - xfs /dev/sdb rw
24 23 0:23 / /data/far\\040away rw,relatime master:1 - nfs4 server:/x rw
25 22 0:24 / /mnt rw,relatime - xfs /dev/sdc rw
26 22 0:25 / /mnt rw,relatime - fuse.sshfs server:/y rw
27 22 0:26 / /run rw,relatime - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind", "state"),
    [
        ("/q.db", "ext4", "ok"),
        ("/data/q.db", "xfs", "ok"),
        ("/database/q.db", "ext4", "ok"),
        ("/data/far away/q.db", "nfs4", "fail"),
        ("/mnt/q.db", "fuse.sshfs", "fail"),
        ("/run/x/q.db", "tmpfs", "advice"),
    ],
)
def test_disks(path, kind, state, tmp_path, monkeypatch):
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS)
    assert sqlite_checkup.file_system(Path(path), table) == kind
    monkeypatch.setattr(sqlite_checkup, "MOUNTS", table)
    assert sqlite_checkup.disk(Path(path)).state == state
    monkeypatch.setattr(sqlite_checkup, "MOUNTS", tmp_path / "none")
    assert sqlite_checkup.disk(Path(path)).state == "unknown"
