"""The fixtures bring up what they say, the environment names it, and nothing outlives the session."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import grpc
import local_cloud
import pytest
from local_cloud.errors import CloudError
from local_cloud.services import Service, alive, free_port, start

LIMIT = 60


def test_localstack_answers_where_the_environment_says(aws: str) -> None:
    assert os.environ["AWS_ENDPOINT_URL"] == aws
    with urllib.request.urlopen(f"{aws}/_localstack/health", timeout=10) as answer:
        assert answer.status == 200


def test_the_emulator_answers_where_the_environment_says(gcp: str) -> None:
    assert os.environ["PUBSUB_EMULATOR_HOST"] == gcp
    with grpc.insecure_channel(gcp) as channel:
        grpc.channel_ready_future(channel).result(timeout=10)


STARTER = """
import sys, time
from pathlib import Path
from local_cloud.services import Service, start
service = Service("sleeper", "", int(sys.argv[1]), ["sleep", "1000"], ready=lambda port: True, marker="sleep")
print(start(service, Path(sys.argv[2]), tied=True).process.pid, flush=True)
time.sleep(1000)
"""


BENCHMARK = """
import time
from benchmarks.clouds import child
with child(["sleep", "1000"]) as process:
    print(process.pid, flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("program", [STARTER, BENCHMARK], ids=["a test session", "a benchmark"])
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_was_started_ends_with_what_is_killed(program: str, sign: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", program, str(free_port()), str(tmp_path)]
    folders = Path(local_cloud.__file__).parents[1:3]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path}
    ) as session:
        assert session.stdout is not None
        group = int(session.stdout.readline())
        assert alive(group, "sleep 1000")
        session.send_signal(sign)
        session.wait(LIMIT)
    deadline = time.monotonic() + LIMIT
    while alive(group):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_service_that_ends_at_once_is_told_with_its_log(tmp_path: Path) -> None:
    service = Service(
        "broken", "", free_port(), ["sh", "-c", "echo why >&2; exit 3"], ready=lambda _: False, marker="sh"
    )
    running = start(service, tmp_path, tied=True)
    with pytest.raises(CloudError, match=r"^broken ended with exit code 3; the end of .*broken\.log:\nwhy$"):
        running.until_ready()
    running.stop()
    assert not alive(running.process.pid)
