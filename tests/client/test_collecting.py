"""The file in which `join` keeps what it received and acked."""

import fcntl
from pathlib import Path

import pytest

from rejoinder.client import collect
from rejoinder.client.collect import open_kept


def test_a_half_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_bytes(b"one\ntwo\nthr")
    with open_kept(path) as kept:
        kept.write(b"four\n")
    assert path.read_bytes() == b"one\ntwo\nfour\n"


def test_only_one_has_it(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    with open_kept(path) as kept:
        kept.write(b"half a line")
        kept.flush()
        with pytest.raises(OSError, match="another join is writing to it") as caught:
            open_kept(path)
        assert caught.value.filename == str(path)
        assert path.read_bytes() == b"half a line"
    open_kept(path).close()


def test_a_file_that_its_owner_deletes_meanwhile_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept"
    owners = [path]

    def after_its_owner(file: object, operation: int) -> None:
        if owners:  # it finishes between our opening and our locking
            owners.pop().unlink()
        original(file, operation)

    original = fcntl.flock
    monkeypatch.setattr(collect.fcntl, "flock", after_its_owner)
    with open_kept(path) as kept:
        kept.write(b"one\n")
    assert path.read_bytes() == b"one\n"
