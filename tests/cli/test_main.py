"""The entry point: help without imports, exit codes, one line for each error."""

import os
import sqlite3
import subprocess
import sys

import pytest
from command import plain, rejoinder

from rejoinder.cli.errors import ExitCode, Failure, failure_of
from rejoinder.cli.main import COMMANDS

QUEUE = "sqlite:///work.db?queue=q"

HEAVY = {"torch", "transformers", "pydantic", "asyncio", "rich", "structlog", "tenacity", "sqlite3", "boto3", "google"}
AFTER_HELP = """
import sys
from rejoinder.cli.main import main
sys.argv = ["rejoinder", "--help"]
try:
    main()
finally:
    sys.stderr.write(" ".join(sys.modules))
"""


def test_help_lists_all_commands_and_imports_none(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AFTER_HELP],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=plain(),
    )
    for name, (_, text) in COMMANDS.items():
        assert f"  {name}" in done.stdout
        assert text in done.stdout
    imported = set(done.stderr.split())
    assert not HEAVY & {name.partition(".")[0] for name in imported}
    assert {name for name in imported if name.startswith("rejoinder.")} == {
        "rejoinder.cli",
        "rejoinder.cli.errors",
        "rejoinder.cli.main",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_its_help(command: str, tmp_path) -> None:
    done = rejoinder(command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first = COMMANDS[command][1].rstrip(".").split(";")[0].split(":")[0]
    assert first in done.stdout.decode()
    assert done.stdout.startswith(b"Usage: rejoinder " + command.encode())


def test_version(tmp_path) -> None:
    one, other = rejoinder("version", cwd=tmp_path), rejoinder("--version", cwd=tmp_path)
    assert one.stdout == other.stdout
    assert one.stdout.startswith(b"rejoinder ")
    assert one.returncode == other.returncode == 0


def test_usage_errors_are_2(tmp_path) -> None:
    for args, says in {
        ("publsh",): "Did you mean 'publish'?",
        ("publish",): "Missing option '--requests'",
        ("consume", "--responses", "nothing://x"): "rejoinder consume: cannot open 'nothing://x': unknown scheme",
        ("publish", "--requests", "sqlite:///work.db"): "rejoinder publish: ",
        ("consume", "--responses", QUEUE, "--count", "-1"): "--count",
    }.items():
        done = rejoinder(*args, cwd=tmp_path)
        assert done.returncode == 2, (args, done.stderr)
        assert says in done.stderr.decode()
        assert b"Traceback" not in done.stderr
        assert done.stdout == b""


def test_an_error_of_the_adapter_is_one_line(tmp_path) -> None:
    (tmp_path / "work.db").write_bytes(b"this is no database, and it is longer than a header of SQLite would be" * 20)
    done = rejoinder("publish", "--requests", QUEUE, cwd=tmp_path, stdin=b'{"metadata": {}, "body": 1}\n')
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(b"rejoinder publish: ")


def test_a_file_that_is_not_there(tmp_path) -> None:
    for args in (("publish", "--requests", QUEUE, "none.jsonl"), ("join", "none.jsonl", "none.jsonl")):
        done = rejoinder(*args, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.decode() == f"rejoinder {args[0]}: cannot open none.jsonl: No such file or directory\n"


def test_a_closed_pipe_ends_quietly(tmp_path) -> None:
    lines = b"".join(b'{"metadata": {"n": %d}, "body": 0}\n' % n for n in range(20_000))
    (tmp_path / "requests").write_bytes(lines)
    (tmp_path / "responses").write_bytes(b"")
    for args in (["publish", "--requests", QUEUE, "requests"], ["join", "requests", "responses"]):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "rejoinder.cli.main", *args]
        done = subprocess.run(
            command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, check=False, timeout=60, env=plain()
        )
        os.close(writer)
        assert done.returncode == 1
        assert done.stderr == b""


def test_bugs_keep_their_traceback() -> None:
    assert failure_of(ZeroDivisionError()) is None
    failure = failure_of(Failure("no", ExitCode.INCOMPLETE))
    assert failure is not None
    assert failure.code == 3


def test_a_full_disk_under_the_index_is_one_line() -> None:
    failure = failure_of(sqlite3.OperationalError("database or disk is full"))
    assert str(failure) == (
        "the temporary index cannot be kept: database or disk is full (TMPDIR names another directory for it)"
    )


def test_a_list_is_a_repeated_option_or_a_comma_separated_one(tmp_path):
    flags = ("--allow-input", "s3://a/x", "--allow-input", "gs://b,file:///c")
    done = rejoinder("config", *flags, "--requests", "memory://a", "--responses", "memory://b", cwd=tmp_path)
    assert b"allow_input\ts3://a/x,gs://b,file:///c\tflag\n" in done.stdout
    assert b"served_model_name\t\tdefault\n" in done.stdout
