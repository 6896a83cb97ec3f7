"""URLs of the embedded brokers: what is refused, and what the refusal names."""

import pytest

from rejoinder.adapters import BadURL, memory, open_subscription, open_topic
from rejoinder.adapters.embedded import DEFAULT_LEASE

REFUSED = [
    ("no-scheme", "unknown scheme"),
    ("redis://host/1", "redis"),
    ("memory:x", "unknown scheme"),
    ("memory://", "NAME"),
    ("memory:///x", "NAME"),
    ("memory://x/y", "path"),
    ("memory://x?queue=y", "'queue'"),
    ("memory://x#y", "fragment"),
    ("memory://x?lease=", "no value"),
    ("memory://x?lease", "cannot read"),
    ("memory://x?lease=1&lease=2", "twice"),
    ("memory://x?lease=soon", "'lease'"),
    ("memory://x?lease=nan", "'lease'"),
    ("memory://x?lease=0", "'lease'"),
    ("memory://x?lease=1e9", "'lease'"),
    ("memory://x?max_attempts=0", "'max_attempts'"),
    ("memory://x?max_attempts=-1", "'max_attempts'"),
    ("memory://x?max_attempts=2.5", "'max_attempts'"),
    ("memory://x?max_attempts=%D9%A3", "'max_attempts'"),
    ("memory://x?max_attempts=" + "9" * 5000, "'max_attempts'"),
    ("memory://x?dead_letter=y", "'max_attempts'"),
    ("memory://x?max_attempts=2&dead_letter=x", "another queue"),
    ("sqlite:///x.db", "'queue'"),
    ("sqlite:///x.db?queue=", "'queue'"),
    ("sqlite:///x.db?queue=a&wal=1", "'wal'"),
    ("sqlite:///x.db?queue=a&max_attempts=2&dead_letter=a", "another queue"),
    ("sqlite:///x.db?queue=a&lease=x", "'lease'"),
    ("sqlite://x.db?queue=a", "sqlite:///RELATIVE"),
    ("sqlite:///?queue=a", "sqlite:///RELATIVE"),
    ("sqlite:///dir/?queue=a", "sqlite:///RELATIVE"),
    ("sqlite:///a%00b?queue=a", "sqlite:///RELATIVE"),
    ("sqlite:///:memory:?queue=a", "memory://"),
]


@pytest.mark.parametrize("opener", [open_subscription, open_topic])
@pytest.mark.parametrize(("url", "named"), REFUSED)
async def test_refused_by_name(opener, url, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadURL, match=named):
        async with opener(url):
            pass
    assert list(tmp_path.iterdir()) == []


async def test_memory_options():
    async with open_subscription(memory.fresh_url()) as subscription:
        assert (subscription.lease_seconds, subscription.max_attempts) == (DEFAULT_LEASE, None)
    async with open_subscription(memory.fresh_url("lease=2.5&max_attempts=3")) as subscription:
        assert (subscription.lease_seconds, subscription.max_attempts) == (2.5, 3)


async def test_sqlite_paths(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    async with (
        open_topic("sqlite:///sub/a.db?queue=q") as relative,
        open_topic(f"sqlite:///{tmp_path}/sub/a.db?queue=q") as absolute,
        open_topic("sqlite:///sub/../sub/a.db?queue=q&lease=9") as roundabout,
        open_topic("sqlite:///sub/b%20%3F%23%25.db?queue=q") as other,
    ):
        assert relative.name == absolute.name == roundabout.name != other.name
    assert {path.name for path in (tmp_path / "sub").iterdir()} == {"a.db", "b ?#%.db"}
