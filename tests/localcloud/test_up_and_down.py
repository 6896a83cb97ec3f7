"""`localstack/up` and `localstack/down` as a user runs them, without containers."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from aiobotocore.session import get_session
from google.pubsub_v1 import SubscriberClient
from local_cloud.services import HOST, alive, free_port, taken
from local_cloud.state import State

from rejoinder.adapters import Checkup, Outgoing, check_subscription, check_topic, open_subscription, open_topic

ROOT = Path(__file__).parents[2]
LIMIT = 500


def script(name: str, *arguments: str, state: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "localstack" / name, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={**os.environ, "XDG_STATE_HOME": str(state), **variables},
    )


class Cloud:
    """A local cloud that is up: its ports, and what `up` printed."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.ports = (free_port(), free_port())
        up = self.up(*self.port_options)
        assert up.returncode == 0, up.stderr
        self.printed = up.stdout

    @property
    def port_options(self) -> tuple[str, ...]:
        return ("--processes", "--aws-port", str(self.ports[0]), "--pubsub-port", str(self.ports[1]))

    @property
    def state(self) -> State:
        return State(**json.loads((self.home / "rejoinder" / "local-cloud" / "state.json").read_text()))

    @property
    def environment(self) -> dict[str, str]:
        """What `up` says to export."""
        lines = [shlex.split(line)[1] for line in self.printed.splitlines() if line.startswith("export ")]
        return dict(line.split("=", 1) for line in lines)

    def up(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return script("up", *arguments, state=self.home)

    def urls(self, *prefixes: str) -> list[str]:
        """The URLs that `up` printed and that start with one of `prefixes`, in order."""
        return [word for word in self.printed.split() if word.startswith(prefixes)]


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    home = tmp_path_factory.mktemp("state")
    try:
        yield Cloud(home)
    finally:
        script("down", state=home)


@pytest.fixture
def at(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    """The cloud, with the environment that it says to set."""
    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value)
    return cloud


async def exchange(topic_url: str, subscription_url: str) -> list[bytes]:
    """Publish one message and receive it."""
    async with open_topic(topic_url) as topic:
        (sent,) = await topic.publish([Outgoing(b'{"a": 1}', {"b": "c"}, ordering_key="k", deduplication_id="d")])
    assert isinstance(sent, str), sent
    async with open_subscription(subscription_url) as subscription:
        messages = await subscription.receive(1, 20)
        assert [error for error in await subscription.ack(messages) if error] == []
    assert [dict(message.attributes)["b"] for message in messages] == ["c"]
    return [message.body for message in messages]


async def test_every_printed_url_works(at: Cloud) -> None:
    ways = [(url, url) for url in at.urls("awssqs:")]
    assert len(ways) == 6
    ways += [(at.urls("awssns:")[0], at.urls("awssqs:///responses-by-sns")[0])]
    for name in ("requests", "responses"):
        (topic,) = [url for url in at.urls("gcppubsub:") if url.endswith(f"/topics/{name}")]
        (subscription,) = [url for url in at.urls("gcppubsub:") if url.endswith(f"/subscriptions/{name}")]
        ways += [(topic, subscription), (f"{topic}-ordered", f"{subscription}-ordered")]
    for topic, subscription in ways:
        assert await exchange(topic, subscription) == [b'{"a": 1}'], (topic, subscription)


async def test_requests_have_a_lease_and_a_dead_letter_policy(at: Cloud) -> None:
    sources = [*at.urls("awssqs:///requests?", "awssqs:///requests.fifo?"), at.urls("gcppubsub:")[1]]
    for url in [*sources, f"{sources[-1]}-ordered"]:
        async with open_subscription(url) as subscription:
            assert (subscription.lease_seconds, subscription.max_attempts) == (60, 5), url
            assert subscription.keeps_order == ("fifo" in url or "-ordered" in url), url


async def test_doctor_has_nothing_to_advise(at: Cloud) -> None:
    for name in ("requests", "requests.fifo", "responses", "responses.fifo"):
        assert _advice(await check_subscription(f"awssqs:///{name}?region=us-east-1")) == (
            [] if name.startswith("requests") else ["dead-letter policy"]
        )
        assert _advice(await check_topic(f"awssqs:///{name}?region=us-east-1")) == []
    assert _advice(await check_topic(at.urls("awssns:")[0])) == []
    for name in ("requests", "requests-ordered"):
        assert _advice(await check_subscription(f"gcppubsub://projects/local/subscriptions/{name}")) == []
    for name in ("responses", "responses-ordered"):
        assert _advice(await check_topic(f"gcppubsub://projects/local/topics/{name}")) == []


def _advice(checkup: Checkup) -> list[str]:
    # Dead letters may be there: other tests leave some.
    findings = [finding for finding in checkup.findings if finding.state in {"advice", "fail"}]
    return [finding.check for finding in findings if finding.check != "dead letters"]


def test_pub_sub_retries_with_backoff(at: Cloud) -> None:
    path = at.urls("gcppubsub:")[1].removeprefix("gcppubsub://")
    with SubscriberClient() as client:
        subscription = client.get_subscription(subscription=path)
    assert subscription.retry_policy.minimum_backoff.total_seconds() == 1
    assert subscription.retry_policy.maximum_backoff.total_seconds() == 60
    assert subscription.dead_letter_policy.dead_letter_topic == "projects/local/topics/requests-dead"


async def test_the_buckets_are_there(at: Cloud) -> None:
    client: Any = get_session().create_client("s3")
    async with client as s3:
        for url in at.urls("s3://"):
            await s3.head_bucket(Bucket=url.removeprefix("s3://"))
    assert len(at.urls("s3://")) == 2


def test_again_changes_nothing_and_prints_the_same(cloud: Cloud) -> None:
    groups = cloud.state.groups
    again = cloud.up("--env")
    assert again.returncode == 0, again.stderr
    exports = [line for line in cloud.printed.splitlines() if line.startswith("export ")]
    assert again.stdout.splitlines() == exports
    assert (cloud.home / "rejoinder" / "local-cloud" / "env").read_text() == again.stdout
    assert cloud.state.groups == groups


def test_other_ports_while_it_is_up_are_refused(cloud: Cloud) -> None:
    other = cloud.up("--aws-port", "1")
    assert (other.returncode, other.stdout) == (1, "")
    up, wanted = f"--aws-port {cloud.ports[0]}", "--aws-port 1"
    assert other.stderr == f"localstack/up: it is up with {up}, not {wanted}: localstack/down first\n"


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http"])
def test_what_is_no_port_is_refused(cloud: Cloud, port: str) -> None:
    refused = cloud.up(f"--pubsub-port={port}")
    assert refused.returncode == 2
    assert f"--pubsub-port: {port!r} is not a port: a whole number from 1 to 65535" in refused.stderr


def test_a_state_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    refused = script("up", state=tmp_path / "state")
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert str(tmp_path / "state") in refused.stderr


def test_an_up_that_was_killed_while_it_waited_is_taken_up_again(tmp_path: Path) -> None:
    """Emulators that are not ready yet are waited for, not started twice."""
    ports = {"--aws-port": str(free_port()), "--pubsub-port": str(free_port())}
    options = ["--processes", *(word for pair in ports.items() for word in pair)]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "localstack")}
    state = tmp_path / "rejoinder" / "local-cloud" / "state.json"
    try:
        with subprocess.Popen([sys.executable, "-m", "local_cloud", "up", *options], env=environment) as first:
            deadline = time.monotonic() + LIMIT
            while not state.exists() or len(json.loads(state.read_text())["groups"]) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            first.kill()
        groups = json.loads(state.read_text())["groups"]
        up = script("up", state=tmp_path)
        assert up.returncode == 0, up.stderr
        assert "starting" not in up.stderr
        assert json.loads(state.read_text())["groups"] == groups
    finally:
        assert script("down", state=tmp_path).returncode == 0
    assert not any(alive(group) for group, _ in groups.values())


def test_what_died_is_started_again(cloud: Cloud) -> None:
    before = cloud.state.groups
    os.killpg(before["Pub/Sub emulator"][0], signal.SIGKILL)
    assert cloud.up().returncode == 0
    after = cloud.state.groups
    assert after["LocalStack"] == before["LocalStack"]
    assert after["Pub/Sub emulator"] != before["Pub/Sub emulator"]
    assert alive(*after["Pub/Sub emulator"])


def test_a_taken_port_is_named_and_nothing_is_started(tmp_path: Path) -> None:
    with closing(socket.create_server((HOST, 0))) as other:
        port = other.getsockname()[1]
        up = script("up", "--processes", "--aws-port", str(free_port()), "--pubsub-port", str(port), state=tmp_path)
    assert up.returncode == 1
    assert not (tmp_path / "rejoinder" / "local-cloud" / "state.json").exists()
    assert up.stderr == (
        f"localstack/up: port {port} of {HOST} is taken by something else: stop that, or give Pub/Sub emulator another "
        "(--pubsub-port)\n"
    )


def test_down_leaves_no_process_no_port_and_no_files(cloud: Cloud) -> None:
    """The last test of this module: it ends the cloud."""
    groups = cloud.state.groups
    assert all(alive(*group) for group in groups.values())
    assert all(taken(port) for port in cloud.ports)
    down = script("down", state=cloud.home)
    assert (down.returncode, down.stderr) == (0, "the local cloud is down\n")
    assert not any(alive(group) for group, _ in groups.values())
    assert not any(taken(port) for port in cloud.ports)
    left = {path.name for path in (cloud.home / "rejoinder" / "local-cloud").iterdir()}
    assert left == {"lock", "localstack.log", "pubsub-emulator.log"}
    again = script("down", state=cloud.home)
    assert (again.returncode, again.stderr) == (0, "the local cloud is not up\n")
