"""publish, consume and join, as a user runs them on an embedded broker."""

import json
import signal
from typing import Any

import pytest
from command import rejoinder, start
from queues import REQUESTS, RESPONSES, consume, counts, lines, publish, request, response


def test_publish_prints_the_ids_in_order_and_consume_gives_the_lines_back(tmp_path) -> None:
    (tmp_path / "requests.jsonl").write_bytes(lines(*map(request, range(3000))))
    done = rejoinder("publish", "--requests", REQUESTS, "requests.jsonl", cwd=tmp_path)
    assert done.returncode == 0
    ids = done.stdout.decode().split()
    assert len(set(ids)) == 3000
    assert b"published 3000 requests in " in done.stderr
    back = consume(tmp_path, REQUESTS, "--count", "3000")
    assert back.returncode == 0
    assert back.stdout == (tmp_path / "requests.jsonl").read_bytes()
    assert back.stderr == b""


def test_publish_leaves_bad_lines_out(tmp_path) -> None:
    stdin = request(1) + b"\r\n\r\n{\n" + b'{"metadata": 1, "body": 2}\n' + b'{"metadata": {}}\n' + request(2)
    done = rejoinder("publish", "--requests", REQUESTS, "-", cwd=tmp_path, stdin=stdin)
    assert done.returncode == 1
    assert len(done.stdout.split()) == 2
    said = done.stderr.decode().splitlines()
    assert [line.partition(" is not published: ")[0] for line in said[:3]] == [
        f"rejoinder publish: line {number}" for number in (3, 4, 5)
    ]
    assert "metadata must be a JSON object" in said[1]
    assert "give exactly one of body and input_location" in said[2]
    assert said[3].startswith("published 2 requests in ")
    assert said[3].endswith(", 3 not")
    assert consume(tmp_path, REQUESTS, "--count", "2").stdout == lines(request(1), request(2))


def test_raw_sends_anything(tmp_path) -> None:
    done = rejoinder("publish", "--raw", "--requests", REQUESTS, cwd=tmp_path, stdin=b'nope\r\n\n {"a": "\xff"}')
    assert done.returncode == 0
    back = consume(tmp_path, REQUESTS, "--timeout", "0.1")
    assert back.stdout == b'nope\n {"a": "\xff"}\n'


def test_publish_answers_before_its_input_ends(tmp_path) -> None:
    with start("publish", "--requests", REQUESTS, cwd=tmp_path) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        for number in range(3):
            running.stdin.write(request(number) + b"\n")
            running.stdin.flush()
            assert running.stdout.readline().strip()
        running.send_signal(signal.SIGINT)  # it waits in a read that nobody ends
        assert running.wait(timeout=60) == 130
        assert running.stderr is not None
        assert running.stderr.read() == b""
    assert len(consume(tmp_path, REQUESTS, "--count", "3").stdout.splitlines()) == 3


def test_consume_says_when_too_few_came(tmp_path) -> None:
    publish(tmp_path, RESPONSES, response(1), response(2))
    done = consume(tmp_path, RESPONSES, "--count", "3", "--timeout", "0.1")
    assert done.returncode == 3
    assert done.stdout == lines(response(1), response(2))
    assert done.stderr == b"rejoinder consume: 2 of 3 responses came, then none for 0.1 seconds\n"
    assert consume(tmp_path, RESPONSES, "--timeout", "0").stdout == b""


def test_consume_with_attributes(tmp_path) -> None:
    publish(tmp_path, RESPONSES, response(1), b"nope")
    done = consume(tmp_path, RESPONSES, "--count", "2", "--attributes")
    assert done.stdout == lines(
        b'{"attributes":{},"response":' + response(1) + b"}", b'{"attributes":{},"response":"nope"}'
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_consume_stops_cleanly(tmp_path, number: signal.Signals, code: int) -> None:
    publish(tmp_path, RESPONSES, *map(response, range(3)))
    with start("consume", "--responses", RESPONSES, cwd=tmp_path) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        for n in range(3):
            assert running.stdout.readline() == response(n) + b"\n"
        running.send_signal(number)
        assert running.wait(timeout=60) == code
        assert running.stderr.read() == b""
    assert consume(tmp_path, RESPONSES, "--timeout", "0").stdout == b"", "they were acked"


def test_join_two_files(tmp_path) -> None:
    (tmp_path / "requests").write_bytes(lines(*map(request, range(5)), b"nope"))
    (tmp_path / "responses").write_bytes(lines(*map(response, (4, 3, 2, 2, 9)), response(0, 400), response(3, 500)))
    shown = [
        item for kind in ("missing", "duplicate", "conflicting", "failed", "unmatched") for item in ("--show", kind)
    ]
    done = rejoinder("join", "requests", "responses", "-o", "joined", *shown, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == b""
    joined: list[Any] = [json.loads(line) for line in (tmp_path / "joined").read_bytes().splitlines()]
    assert [line["request"]["metadata"]["n"] for line in joined] == list(range(5))
    assert [line["response"] and line["response"]["status_code"] for line in joined] == [400, None, 200, 200, 200]
    assert counts(done.stderr) == {
        "requests": 5,
        "joined": 4,
        "missing": 1,
        "failed": 1,
        "duplicate": 1,
        "conflicting": 1,
        "unmatched": 1,
        "ambiguous": 0,
        "malformed": 1,
    }
    for line in (
        "missing: request line 2: no response",
        "failed: request line 1: status 400 (response line 6)",
        "duplicate: response line 4: the same answer as line 3, to request line 3",
        "conflicting: response line 7: another answer than line 2, to request line 4",
        "unmatched: response line 5: no request has its metadata",
    ):
        assert line in done.stderr.decode().splitlines()


def test_join_says_whether_all_are_answered(tmp_path) -> None:
    (tmp_path / "responses").write_bytes(lines(response(1), response(2)))
    for numbers, code in (((1, 2), 0), ((1, 2, 3), 3), ((1, 1), 1)):
        done = rejoinder("join", "-", "responses", cwd=tmp_path, stdin=lines(*map(request, numbers)))
        assert done.returncode == code
        assert len(done.stdout.splitlines()) == len(numbers)


def test_join_by_a_key(tmp_path) -> None:
    (tmp_path / "requests").write_bytes(b'{"metadata": {"doc": {"id": 7}, "run": 1}, "body": 0}\n')
    (tmp_path / "responses").write_bytes(b'{"status_code": 200, "metadata": {"doc": {"id": 7}, "run": 2}, "body": 0}\n')
    assert rejoinder("join", "requests", "responses", cwd=tmp_path).returncode == 3
    assert rejoinder("join", "requests", "responses", "--on", "doc.id", cwd=tmp_path).returncode == 0


def test_join_does_not_overwrite_what_it_reads(tmp_path) -> None:
    (tmp_path / "requests").write_bytes(request(1) + b"\n")
    (tmp_path / "responses").write_bytes(response(1) + b"\n")
    for name in ("requests", "responses"):
        done = rejoinder("join", "requests", "responses", "-o", name, cwd=tmp_path)
        assert done.returncode == 2
        assert (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    "args", [("publish", "--requests"), ("consume", "--count", "0", "--responses"), ("join", "requests")]
)
def test_a_queue_inside_the_process_is_refused(tmp_path, args: tuple[str, ...]) -> None:
    (tmp_path / "requests").write_bytes(request(1) + b"\n")
    done = rejoinder(*args, "memory://x", cwd=tmp_path, stdin=request(1) + b"\n")
    assert done.returncode == 2
    assert done.stdout == b""
    assert (
        done.stderr.decode()
        == f"rejoinder {args[0]}: memory://x is inside this process and gone with it: no worker can see it\n"
    )
    assert not (tmp_path / "requests.responses").exists()


def test_a_worker_refuses_to_answer_where_it_asks(tmp_path) -> None:
    done = rejoinder("worker", "--engine", "echo", "--requests", REQUESTS, "--responses", REQUESTS, cwd=tmp_path)
    assert done.returncode == 2
    why = "is where requests come from: answers would be taken for requests"
    assert done.stderr.decode() == f"rejoinder worker: responses: {REQUESTS!r} {why}\n"
