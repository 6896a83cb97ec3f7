"""One soak on one broker: a worker's process, a backlog kept up, everything written down."""

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.clouds import child
from benchmarks.soak.brokers import BROKERS, Urls
from benchmarks.soak.judge import Record
from rejoinder.adapters import Outgoing, Subscription, Topic, open_subscription, open_topic

LEASE = 10
"""The shortest of Pub/Sub."""
SAMPLE_SECONDS = 1.0
TURN_SECONDS = 0.2
START_SECONDS = 60.0
SPARE = 16
"""Requests beyond the worker's places that are always there: more than its prefetch takes."""
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Plan:
    """What a soak is to be like. Times in seconds."""

    load: float
    shortest: float
    longest: float
    capacity: int

    @property
    def patience(self) -> float:
        """How long after the load the last answers may take: what waits then, and twice for a slow machine."""
        return 2 * (self.longest + SPARE * self.longest / self.capacity) + 30


@dataclass
class Talk:
    """What was sent and what came back."""

    sent: list[int] = field(default_factory=list)
    answers: list[tuple[int | None, int]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    """Broker ids of responses: one that is delivered twice is one answer."""

    @property
    def open(self) -> int:
        """How many requests have no answer yet."""
        return len(self.sent) - len({number for number, _ in self.answers})


async def soak(broker: str, plan: Plan) -> Record:
    """Run one soak and tell what happened."""
    with tempfile.TemporaryDirectory() as folder:
        diary, log = Path(folder) / "diary", Path(folder) / "log"
        async with BROKERS[broker](LEASE) as urls:
            with log.open("wb") as output:
                numbers = [str(plan.shortest), str(plan.longest), str(plan.capacity), str(diary)]
                command = [sys.executable, "-m", "benchmarks.soak.slow", urls.requests, urls.responses, *numbers]
                with child(command, stderr=output) as worker:
                    try:
                        return await _watched(worker, urls, plan, diary, log)
                    except BaseException:
                        sys.stderr.write(log.read_text(errors="replace")[-4000:])
                        raise


async def _watched(worker: subprocess.Popen[bytes], urls: Urls, plan: Plan, diary: Path, log: Path) -> Record:
    series: dict[str, list[tuple[float, float]]] = {"rss": [], "threads": [], "fds": []}
    talk = Talk()
    async with open_topic(urls.requests_in) as topic, open_subscription(urls.responses_out) as responses:
        sampling = asyncio.create_task(_sample(worker, series))
        collecting = asyncio.create_task(_collect(responses, talk))
        try:
            await _top_up(topic, talk, plan)
            await _until(worker, lambda: diary.exists() and '"start"' in diary.read_text(), START_SECONDS)
            began = time.time()
            while time.time() < began + plan.load and worker.poll() is None:
                await _top_up(topic, talk, plan)
                await asyncio.sleep(TURN_SECONDS)
            ended = time.time()
            await _until(worker, lambda: talk.open <= 0, plan.patience)
        finally:
            sampling.cancel()
            await asyncio.wait({sampling})
        worker.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(worker.wait, STOP_SECONDS)
        collecting.cancel()
        await asyncio.wait({collecting})
        while await _take(responses, talk, 1.0):  # a second answer may have come last
            pass
    entries = list(_lines(diary))
    return Record(
        lease=LEASE,
        sent=talk.sent,
        starts=[entry["start"] for entry in entries if "start" in entry],
        longest_job=max((entry["seconds"] for entry in entries if "start" in entry), default=0.0),
        answers=talk.answers,
        leases_lost=sum(entry.get("event") == "lease_lost" for entry in _lines(log)),
        exit_code=code,
        load=(began, ended),
        series={**series, "tasks": [(entry["at"], entry["tasks"]) for entry in entries if "tasks" in entry]},
    )


async def _top_up(topic: Topic, talk: Talk, plan: Plan) -> None:
    """Publish what the worker needs so as not to run out of requests."""
    lacking = plan.capacity + SPARE - talk.open
    numbers = range(len(talk.sent), len(talk.sent) + lacking)
    outcomes = await topic.publish([Outgoing(_envelope(number)) for number in numbers]) if numbers else []
    for outcome in outcomes:
        if not isinstance(outcome, str):
            raise outcome
    talk.sent += numbers


def _envelope(number: int) -> bytes:
    return json.dumps({"path": "/echo", "metadata": {"id": number}, "body": {"id": number}}).encode()


async def _collect(responses: Subscription, talk: Talk) -> None:
    while True:
        await _take(responses, talk, 5.0)


async def _take(responses: Subscription, talk: Talk, wait: float) -> int:
    messages = await responses.receive(responses.max_receive, wait)
    for message in messages:
        if message.id not in talk.seen:
            talk.seen.add(message.id)
            response = json.loads(message.body)
            talk.answers.append(((response["metadata"] or {}).get("id"), response["status_code"]))
    if messages:
        await responses.ack(messages)
    return len(messages)


async def _until(worker: subprocess.Popen[bytes], done: Callable[[], bool], limit: float) -> None:
    """Wait for something, but not for ever and not for a dead worker: the judge says what is missing then."""
    deadline = time.monotonic() + limit
    while not done():
        if worker.poll() is not None or time.monotonic() > deadline:
            return
        await asyncio.sleep(TURN_SECONDS)


async def _sample(worker: subprocess.Popen[bytes], series: dict[str, list[tuple[float, float]]]) -> None:
    process = psutil.Process(worker.pid)
    while worker.poll() is None:
        with process.oneshot():
            now = time.time()
            series["rss"].append((now, process.memory_info().rss))
            series["threads"].append((now, process.num_threads()))
            series["fds"].append((now, process.num_fds()))
        await asyncio.sleep(SAMPLE_SECONDS)


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects in a file."""
    for line in file.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            yield json.loads(line)
