"""The demo, as a user sees it; and what it is made of."""

import io
import json
import re
import signal
from pathlib import Path

import psutil
import pytest
from command import rejoinder, start
from rich.console import Console

from rejoinder.cli.demo_report import Row, show_table, summary
from rejoinder.cli.demo_requests import REFUSED, demo_requests
from rejoinder.schemas.envelope import parse_request
from rejoinder.schemas.openai import BODIES

ROW = re.compile(r"│ +(\d+) +│ (.+?) +│ .+? +│ +(\d+) +│ +(\d+) +│ +([\d.]+) +│ (.+?) +│")
SUMMARY = re.compile(
    r"13 requests, 12 ok, 1 refused \(as intended\), [\d.]+ requests/s, [\d.]+ tokens/s, all joined: yes"
)


@pytest.mark.model
def test_shows_joined_answers(tmp_path: Path) -> None:
    done = rejoinder("demo", "--dir", "kept", cwd=tmp_path, limit=280)
    assert done.returncode == 0, done.stderr.decode()
    out = done.stdout.decode().splitlines()
    rows = [match.groups() for line in out if (match := ROW.match(line))]
    assert [row[0] for row in rows] == [str(number) for number in range(1, 14)]
    by_topic = {row[1]: row for row in rows}
    assert "Paris" in by_topic["geography"][5]
    assert "cat" in by_topic["animals"][5]
    _, _, status, tokens, _, answer = by_topic[REFUSED]
    assert (status, tokens) == ("400", "0")
    assert answer.startswith("temperature")
    assert all(row[2] == "200" and int(row[3]) > 0 for row in rows if row[1] != REFUSED)
    assert SUMMARY.fullmatch(out[-1])
    assert b"a worker is up after" in done.stderr
    assert b"Traceback" not in done.stderr
    responses = next((tmp_path / "kept").glob("responses.jsonl-*")).read_bytes().splitlines()
    assert len(responses) == 13


@pytest.mark.model
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    with start("demo", cwd=tmp_path, env={"TMPDIR": str(tmp_path)}) as running:
        process = psutil.Process(running.pid)
        while not (children := process.children(recursive=True)):
            assert running.poll() is None
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=60) == 130
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.read() == b""
        assert b"Traceback" not in running.stderr.read()
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_a_worker_that_dies_is_reported_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = rejoinder("demo", "--model", "empty", cwd=tmp_path, limit=120)
    assert done.returncode == 1
    assert b"rejoinder demo: the worker ended with exit code 1; the end of its log:\n  " in done.stderr
    assert b"Traceback (most recent call last)" not in done.stderr.partition(b"the end of its log")[0]


def test_all_requests_but_one_are_good() -> None:
    requests = demo_requests("r")
    for request in requests:
        parse_request(json.dumps(request).encode())
        body = json.loads(json.dumps(request["body"]))
        if request["metadata"]["topic"] == REFUSED:
            with pytest.raises(ValueError, match="temperature"):
                BODIES[request["path"]].model_validate(body)
        else:
            BODIES[request["path"]].model_validate(body)
    assert len({request["metadata"]["id"] for request in requests}) == len(requests)


def test_the_table_and_the_summary() -> None:
    requests = demo_requests("r")[:3]
    rows = [
        Row(requests[0], {"status_code": 200, "body": {"choices": [{"text": "one\n[two]"}], "usage": None}}, 0.25),
        Row(requests[1], {"status_code": 500, "body": {"error": {"message": "no [bold]"}}}, 0.5),
        Row(requests[2], None, None),
    ]
    out = io.StringIO()
    show_table(rows, Console(file=out, width=120))
    for text in ("one [two]", "no [bold]", "(no answer)", "0.2", "500"):
        assert text in out.getvalue()
    assert summary(rows, 2.0, all_joined=False) == (
        "3 requests, 1 ok, 0 refused (as intended), 1 failed, 1.5 requests/s, 0.0 tokens/s, all joined: no"
    )
