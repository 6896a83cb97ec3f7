"""Two queues of an embedded broker, and what goes through them."""

import re
import subprocess
from pathlib import Path

from command import rejoinder

REQUESTS = "sqlite:///work.db?queue=requests"
RESPONSES = "sqlite:///work.db?queue=responses"


def request(number: int) -> bytes:
    return b'{"metadata": {"n": %d}, "body": {"prompt": "x"}}' % number


def response(number: int, status: int = 200) -> bytes:
    return b'{"status_code":%d,"metadata":{"n":%d},"body":null}' % (status, number)


def lines(*values: bytes) -> bytes:
    return b"".join(value + b"\n" for value in values)


def counts(stderr: bytes) -> dict[str, int]:
    """The numbers of the summary."""
    return {name: int(number) for name, number in re.findall(r"^(\w+) +(\d+)$", stderr.decode(), re.MULTILINE)}


def publish(cwd: Path, url: str, *bodies: bytes) -> list[str]:
    done = rejoinder("publish", "--raw", "--requests", url, cwd=cwd, stdin=lines(*bodies))
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().split()


def consume(cwd: Path, url: str, *args: str) -> subprocess.CompletedProcess[bytes]:
    return rejoinder("consume", "--responses", url, *args, cwd=cwd)
