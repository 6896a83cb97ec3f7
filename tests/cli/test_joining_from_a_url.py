"""`join` with the URL of a queue: what it takes from there is kept until it has been written elsewhere."""

import os
from pathlib import Path

from command import rejoinder
from queues import RESPONSES, consume, counts, lines, publish, request, response

from rejoinder.cli import join as command
from rejoinder.client.join import Join


def test_join_from_a_url_goes_on_where_it_stopped(tmp_path) -> None:
    (tmp_path / "requests").write_bytes(lines(*map(request, range(3))))
    kept = tmp_path / "requests.responses"
    publish(tmp_path, RESPONSES, response(2), response(0))
    args = ("join", "requests", RESPONSES, "-o", "joined", "--timeout", "0.1")
    done = rejoinder(*args, cwd=tmp_path)
    assert done.returncode == 3
    assert kept.read_bytes() == lines(response(2), response(0))
    assert consume(tmp_path, RESPONSES, "--timeout", "0").stdout == b"", "they were acked"
    publish(tmp_path, RESPONSES, response(1))
    done = rejoinder(*args, cwd=tmp_path)
    assert done.returncode == 0
    assert counts(done.stderr)["joined"] == 3
    assert (tmp_path / "joined").read_bytes() == lines(
        *(b'{"request":' + request(n) + b',"response":' + response(n) + b"}" for n in range(3))
    )
    assert not kept.exists()
    assert rejoinder("join", "-", RESPONSES, cwd=tmp_path).returncode == 2


def test_join_from_a_url_keeps_what_answers_somebody_else(tmp_path) -> None:
    (tmp_path / "requests").write_bytes(request(1) + b"\n")
    kept = tmp_path / "requests.responses"
    theirs = response(2), b'{"status_code":400,"metadata":null,"body":null}'
    publish(tmp_path, RESPONSES, *theirs, response(1))
    args = ("join", "requests", RESPONSES, "-o", "joined")
    done = rejoinder(*args, cwd=tmp_path)
    assert done.returncode == 0
    assert counts(done.stderr)["unmatched"] == 2
    assert kept.read_bytes() == lines(*theirs, response(1))
    said = done.stderr.decode().splitlines()[-1]
    assert said.startswith("2 responses answer none of these requests and may be somebody else's: all are kept in ")
    assert said.endswith("requests.responses")
    joined = (tmp_path / "joined").read_bytes()
    assert rejoinder(*args, cwd=tmp_path).returncode == 0
    assert (tmp_path / "joined").read_bytes() == joined
    # They can be given back: no option of ours, just the other command.
    assert rejoinder("publish", "--raw", "--requests", RESPONSES, kept.name, cwd=tmp_path).returncode == 0
    assert consume(tmp_path, RESPONSES, "--timeout", "0").stdout == kept.read_bytes()


def test_two_joins_do_not_keep_in_one_file(tmp_path) -> None:
    from rejoinder.client.collect import open_kept

    (tmp_path / "requests").write_bytes(request(1) + b"\n")
    publish(tmp_path, RESPONSES, response(1))
    with open_kept(tmp_path / "requests.responses"):
        done = rejoinder("join", "requests", RESPONSES, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == b"rejoinder join: cannot open requests.responses: another join is writing to it\n"
    assert rejoinder("join", "requests", RESPONSES, cwd=tmp_path).returncode == 0


def test_what_is_written_to_a_file_is_durable_before_the_kept_responses_go(tmp_path: Path, monkeypatch) -> None:
    for name, line in (("requests", request(1)), ("responses", response(1))):
        (tmp_path / name).write_bytes(line + b"\n")
    durable: list[int] = []

    def fsync(handle: int) -> None:
        durable.append(os.fstat(handle).st_size)

    monkeypatch.setattr(command.os, "fsync", fsync)
    with Join(tmp_path / "requests", tmp_path / "responses") as joining:
        joining.read_requests()
        joining.read_responses()
        with (tmp_path / "stdout").open("w+b") as stdout:
            monkeypatch.setattr(command, "results", lambda: stdout)
            command._write(joining, None)
        command._write(joining, tmp_path / "output")
        assert durable == [(tmp_path / "output").stat().st_size] * 2
        assert durable[0] > 0
        with Path(os.devnull).open("wb") as nowhere:
            monkeypatch.setattr(command, "results", lambda: nowhere)
            command._write(joining, None)
        command._write(joining, Path(os.devnull))
    assert len(durable) == 2
