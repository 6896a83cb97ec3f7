"""`rejoinder doctor`, as a user sees it."""

import json

import pytest
from command import rejoinder

GOOD = "sqlite:///work.db?queue=requests&max_attempts=5"
RESPONSES = "sqlite:///work.db?queue=responses"


def states(out: bytes) -> dict[tuple[str, str], str]:
    lines = [json.loads(line) for line in out.splitlines()]
    assert all(set(line) == {"side", "check", "state", "fact", "todo"} for line in lines)
    return {(line["side"], line["check"]): line["state"] for line in lines}


def test_two_good_queues(tmp_path):
    done = rejoinder("doctor", "--requests", GOOD, "--responses", RESPONSES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert "ok      requests: lease: 30 s, renewed every 10 s" in lines
    assert "ok      both: different queues: responses go elsewhere than requests come from" in lines
    assert lines[-1].endswith(", 0 fail")
    assert done.stderr == b""
    assert list(tmp_path.iterdir()) == []


def test_one_side_alone(tmp_path):
    done = rejoinder("doctor", "--responses", RESPONSES, "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert {side for side, _ in states(done.stdout)} == {"responses"}
    done = rejoinder("doctor", "--requests", GOOD, "--json", cwd=tmp_path)
    assert {side for side, _ in states(done.stdout)} == {"requests", "worker"}


def test_one_queue_for_both_is_no_good(tmp_path):
    done = rejoinder("doctor", "--requests", GOOD, "--responses", "sqlite:///./work.db?queue=requests", cwd=tmp_path)
    assert done.returncode == 1
    assert "fail    both: different queues: responses arrive where requests come from" in done.stdout.decode()
    assert "        -> name another queue or topic for the responses" in done.stdout.decode()
    assert done.stderr == b""


def test_the_settings_of_the_worker_are_compared(tmp_path):
    (tmp_path / "rejoinder.toml").write_text(f'requests = "{GOOD}"\nmax_attempts = 9\nmodel = "some/model"\n')
    done = rejoinder("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert states(done.stdout)["worker", "attempts"] == "advice"
    assert b"--max-attempts 5" in done.stdout


def test_memory_fails(tmp_path):
    done = rejoinder("doctor", "--requests", "memory://x", cwd=tmp_path)
    assert done.returncode == 1
    assert b"inside one process" in done.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "name a queue with --requests URL, --responses URL or both"),
        (("--requests", "nothing://x"), "unknown scheme"),
        (("--responses", "sqlite:///x.db"), "'queue'"),
        (("--responses", RESPONSES, "--config", "none.toml"), "none.toml"),
    ],
)
def test_usage_errors(args, says, tmp_path):
    done = rejoinder("doctor", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == b""
    assert says in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("url", "env"),
    [
        ("awssqs:///q?region=us-east-1", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", **dict.fromkeys(
            ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")}),
        ("gcppubsub://projects/p/subscriptions/s", {"PUBSUB_EMULATOR_HOST": "127.0.0.1:1"}),
    ],
)  # fmt: skip
def test_a_broker_that_is_away(url, env, tmp_path, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    done = rejoinder("doctor", "--requests", url, cwd=tmp_path, limit=120)
    assert done.returncode == 1, done.stderr
    assert "fail    requests: reachable: " in done.stdout.decode()
    assert "127.0.0.1:1" in done.stdout.decode()
    assert b"Traceback" not in done.stderr
