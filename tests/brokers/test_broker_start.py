"""A broker that is set up wrongly ends the worker with one line that says what to fix; one away is waited for."""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from broker_pairs import Pair, on
from denying import denying_aws, denying_gcp
from pairs import End, Queues
from worker_process import WorkerProcess

from rejoinder.cli.errors import ExitCode

NO_QUEUE = "awssqs:///no-such-queue?region=us-east-1"
NO_SNS_TOPIC = "awssns:///arn:aws:sns:us-east-1:000000000000:no-such-topic?region=us-east-1"
NO_SUBSCRIPTION = "gcppubsub://projects/local/subscriptions/no-such-subscription"
NO_TOPIC = "gcppubsub://projects/local/topics/no-such-topic"
CLOSED = "127.0.0.1:1"
"""A port that nobody listens on and nobody may."""


def between(requests: str, responses: str) -> Queues:
    return Queues(End(requests, requests), End(responses, responses), 10)


async def ending(queues: Queues, log: Path, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """The exit code of a worker that ends by itself, and the one line that it says."""
    with WorkerProcess(queues, log, env=env) as worker:
        code = await asyncio.to_thread(worker.process.wait, 120)
    lines = [line for line in log.read_text().splitlines() if not line.startswith("{")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("rejoinder worker: ")
    return code, lines[0]


@pytest.mark.parametrize("url", [NO_QUEUE, NO_SUBSCRIPTION])
async def test_requests_that_are_not_there(aws: str, gcp: str, url: str, tmp_path: Path) -> None:
    code, line = await ending(between(url, f"sqlite:///{tmp_path}/q.db?queue=responses"), tmp_path / "log")
    assert code == ExitCode.FAILED
    assert "no-such-" in line


@pytest.mark.parametrize("url", [NO_QUEUE, NO_TOPIC, NO_SNS_TOPIC])
async def test_responses_that_have_nowhere_to_go(aws: str, gcp: str, url: str, tmp_path: Path) -> None:
    code, line = await ending(between(f"sqlite:///{tmp_path}/q.db?queue=requests", url), tmp_path / "log")
    assert code == ExitCode.FAILED
    assert "no-such-" in line


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("awssqs:///q?region=us-east-1&leas=3", "unknown parameter 'leas'"),
        ("awssqs:///q?region=us-east-1&lease=43201", "'lease' must be a whole number from 1 to"),
        ("awssqs://example.com/q", "awssqs:///QUEUE?region=REGION"),
        ("gcppubsub://projects/p/subscriptions/s?max_messages=3", "unknown parameter 'max_messages'"),
        ("gcppubsub://projects/p/topics/t", "gcppubsub://projects/PROJECT/subscriptions/NAME"),
        (NO_SNS_TOPIC, "subscribe an SQS queue"),
        ("kafka://broker/topic", "unknown scheme 'kafka'"),
    ],
)
async def test_a_url_that_cannot_be(url: str, said: str, tmp_path: Path) -> None:
    code, line = await ending(between(url, f"sqlite:///{tmp_path}/q.db?queue=responses"), tmp_path / "log")
    assert code == ExitCode.USAGE
    assert said in line
    assert url in line or "no-such-topic" in line


async def test_a_queue_that_the_credentials_do_not_allow(aws: str, tmp_path: Path) -> None:
    async with denying_aws(aws, "GetQueueUrl") as endpoint:
        queues = between(NO_QUEUE, f"sqlite:///{tmp_path}/q.db?queue=responses")
        code, line = await ending(queues, tmp_path / "log", {"AWS_ENDPOINT_URL": endpoint})
    assert code == ExitCode.FAILED
    assert "sqs:GetQueueUrl on no-such-queue" in line


async def test_a_subscription_that_the_credentials_do_not_allow(gcp: str, tmp_path: Path) -> None:
    async with denying_gcp(gcp, "GetSubscription", granted=set()) as address:
        queues = between(NO_SUBSCRIPTION, NO_TOPIC)
        code, line = await ending(queues, tmp_path / "log", {"PUBSUB_EMULATOR_HOST": address})
    assert code == ExitCode.FAILED
    assert "roles/pubsub" in line
    assert "no-such-subscription" in line


@on("sqs", "pubsub")
async def test_a_broker_that_is_away_is_waited_for_and_the_wait_can_be_stopped(pair: Pair, tmp_path: Path) -> None:
    queues, env = await pair.queues(), {"AWS_ENDPOINT_URL": f"http://{CLOSED}", "PUBSUB_EMULATOR_HOST": CLOSED}
    with WorkerProcess(queues, tmp_path / "log", env={**os.environ, **env}) as worker:
        worker.until_event("broker_retry", count=3)
        assert worker.stop(60) == 0, worker.log.read_text()
    assert not worker.events("worker_starting")
    assert "Traceback" not in worker.log.read_text()
