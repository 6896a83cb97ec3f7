"""Cancelling with real workers: on each kind of broker and store, across a kill, and of the real model's work."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from broker_pairs import Pair, on
from pairs import Queues, sqlite
from store_kills import bucket
from worker_process import LoggingProcess, SlowWorker
from worker_process import WorkerProcess as RealWorker

from rejoinder.adapters import Message, open_blobs
from rejoinder.adapters.cancel_marks import name_of
from rejoinder.client.cancel import cancel, cancels_of

FOR_EVER = 1e6
IDLE = 8.0
KILLED_AT_ACK = Path(__file__).parents[1] / "support" / "killed_at_ack.py"


def request(number: int, **options: Any) -> bytes:
    return json.dumps({"metadata": {"n": number}, "body": {"n": number}, "options": options}).encode()


def statuses(messages: list[Message]) -> dict[int, int]:
    answers = [json.loads(message.body) for message in messages]
    return {answer["metadata"]["n"]: answer["status_code"] for answer in answers}


async def names_of(url: str) -> set[str | None]:
    async with open_blobs(url) as store:
        return {name_of(one.key) async for one in store.list()}


async def until_unmarked(url: str, limit: float = 60.0) -> None:
    async with asyncio.timeout(limit):
        while await names_of(url):
            await asyncio.sleep(0.05)


async def command(*args: str, stdin: str = "") -> None:
    """Run `rejoinder cancel` as a user does."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "rejoinder.cli.main", "cancel", *args, stdin=pipe, stderr=pipe
    )
    _, said = await process.communicate(stdin.encode())
    assert process.returncode == 0, said.decode()


async def check(queues: Queues, log: Path, url: str, *named: str, **settings: Any) -> None:
    """Cancel two of four requests by their two kinds of id; another one after the worker has begun to stop."""
    with SlowWorker(queues, log, FOR_EVER, grace_seconds=60, **settings) as worker:
        ids = await queues.send(request(0), request(1, inference_id="doc/1"), request(2), request(3))
        await asyncio.to_thread(worker.until_event, "engine_ready")
        await command(*named, ids[0], "-", stdin="doc/1\n")
        got = await queues.receive(2)
        assert statuses(got) == {0: 499, 1: 499}
        await until_unmarked(url)
        worker.process.terminate()
        await asyncio.to_thread(worker.until_event, "stopping")
        await command(*named, ids[2], ids[3])
        got += await queues.receive_some(1.0)
        assert await asyncio.to_thread(worker.process.wait, 60) == 0
    got += await queues.receive_some(1.0)
    left = {message.id for message in await queues.left_over()}
    # What had not begun went back with the signal; what ran was cancelled while it ran out its grace.
    answered = statuses(got)
    assert set(answered.values()) == {499}
    assert left == {ids[number] for number in range(4) if number not in answered}


async def test_on_sqlite_with_the_marks_beside_the_file(tmp_path: Path) -> None:
    queues = sqlite(tmp_path, lease=5)
    url = cancels_of(requests=queues.requests)
    assert url == f"file://{tmp_path}/queues.db.cancels/"
    # Also where there is a store for results: the command need not name it.
    await check(queues, tmp_path / "worker.log", url, "--requests", queues.outbox, blobs=f"file://{tmp_path}/blobs")


@on("sqs", "fifo")
async def test_on_sqs_with_the_marks_on_s3(pair: Pair, tmp_path: Path) -> None:
    queues = await pair.queues(lease=10)
    async with bucket() as store:
        url = f"{store.url}/cancels"
        await check(queues, tmp_path / "worker.log", url, "--blobs", store.url, blobs=store.url)


async def test_a_kill_between_answer_and_ack_keeps_the_mark(tmp_path: Path) -> None:
    queues, log = sqlite(tmp_path, lease=5), tmp_path / "worker.log"
    url = cancels_of(requests=queues.requests)
    command = [str(KILLED_AT_ACK), queues.requests, queues.responses]
    with LoggingProcess(command, log) as worker:
        (message_id,) = await queues.send(request(0))
        await asyncio.to_thread(worker.until_event, "engine_ready")
        await cancel(url, [message_id])
        assert await asyncio.to_thread(worker.process.wait, 60) == -9
    first = await queues.receive(1)
    assert statuses(first) == {0: 499}
    assert await names_of(url) == {message_id}
    with SlowWorker(queues, log, FOR_EVER) as worker:
        again = await queues.receive(1)
        assert statuses(again) == {0: 499}
        for name in ("response_id", "request_message_id"):
            assert first[0].attributes[name] == again[0].attributes[name]
        assert again[0].attributes["attempt"] == "2"
        await until_unmarked(url)
        await queues.until_settled()
        assert worker.stop() == 0


@pytest.mark.model
async def test_the_model_stops_making_tokens(tmp_path: Path) -> None:
    queues, log = sqlite(tmp_path, lease=10), tmp_path / "worker.log"
    url = cancels_of(requests=queues.requests)
    engine = ("--model", "smollm2", "--max-model-len", "8192")
    body = {"prompt": "Once upon a time", "max_tokens": 8000, "temperature": 0}
    with RealWorker(queues, log, engine=engine) as worker:
        long = json.dumps({"metadata": {"n": 0}, "body": body}).encode()
        (message_id,) = await queues.send(long)
        await asyncio.to_thread(worker.until_event, "engine_ready", 250)
        # It runs: minutes of tokens are asked for, and the first report says that there are steps.
        report = await asyncio.to_thread(worker.until_event, "progress", 120)
        assert report["tokens_per_step"] > 0
        assert report["answered"] == 0
        await cancel(url, [message_id])
        assert statuses(await queues.receive(1)) == {0: 499}
        await until_unmarked(url)
        await asyncio.sleep(IDLE)  # the time itself in which no step is made
        await queues.send(json.dumps({"metadata": {"n": 1}, "body": {"prompt": "Hi", "max_tokens": 2}}).encode())
        assert statuses(await queues.receive(1)) == {1: 200}
        assert worker.stop() == 0
        end = worker.events("worker_stopped")[-1]
        assert end["idle_seconds"] > IDLE - 2, "it made no steps once the request was cancelled"
