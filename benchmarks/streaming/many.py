"""Many streams of one worker at once, each said chunk by chunk at a steady pace, and plain requests beside them.

Each cell is a fresh worker (a process; its app in another) on fresh queues. `fifo` and `pubsub` get an ordering key for
each stream; `pubsub-far` is the emulator behind a proxy that holds what goes either way for `FAR_SECONDS`, since an
emulator on this machine answers sooner than any service. Nothing is asked of the broker while the streams run.
Responses are read afterwards, and must hold each stream whole; every delay is from when a chunk was said, or a plain
request was published, to when the broker took the message that has it, by the clock that they share.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.brokers.measure import until_quiet
from benchmarks.clouds import child, clouds
from benchmarks.soak.brokers import Urls, on_pubsub, on_sqlite, on_sqs
from rejoinder.adapters import Message, Outgoing, open_subscription, open_topic

BROKERS = {
    "sqlite": on_sqlite,
    "pubsub": on_pubsub,
    "pubsub-far": on_pubsub,
    "fifo": partial(on_sqs, fifo=True),
    "sqs": on_sqs,
}
LEASE = 60
FAR_SECONDS = 0.01
PAUSE = 0.02
PLAIN_PAUSE = 0.05
LIMIT = 300.0
WORKER = ["benchmarks.brokers.calls", "{calls}", "benchmarks.streaming.talker"]
SENDS = {"Publish", "SendMessageBatch"}


@dataclass
class Found:
    """What the responses say. Times in seconds since the epoch, delays in seconds."""

    streams: dict[int, dict[int, Any]] = field(default_factory=lambda: defaultdict(dict))
    """Of each, its messages' chunks by index."""
    sent: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)
    plain: dict[int, float] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)

    def take(self, message: Message) -> None:
        """Read one response."""
        said, at = json.loads(message.body), message.sent_at or 0.0
        if said["status_code"] != 200:
            raise SystemExit(f"an error was answered: {said}")
        if "stream" not in said:
            self.plain[said["metadata"]["plain"]] = at - said["body"]["at"]
            return
        number, place = said["metadata"]["stream"], said["stream"]
        if place["done"]:
            self.ended.add(number)
        elif place["index"] not in self.streams[number]:  # else it came twice
            chunks = said["body"] if place.get("chunks", 1) > 1 else [said["body"]]
            self.streams[number][place["index"]] = chunks
            self.sent.append(at)
            (self.rest if place["index"] else self.first).append(at - chunks[0]["at"])

    def check(self, chunks: int) -> None:
        """See that each stream is whole."""
        for number in self.ended:  # one of which no chunk came has no place in `streams`
            messages = self.streams[number]
            said = [chunk["n"] for index in sorted(messages) for chunk in messages[index]]
            if said != [*range(chunks)]:
                raise SystemExit(f"stream {number} is not whole: {said}")


def compare(brokers: Sequence[str], streams: Sequence[int], seconds: float, settings: Mapping[str, str]) -> None:
    """Measure each number of streams on each broker, and print a line for each."""
    aws, gcp = bool({"sqs", "fifo"} & {*brokers}), any(one.startswith("pubsub") for one in brokers)
    with clouds(aws=aws, gcp=gcp):
        for broker in brokers:
            for number in streams:
                print(f"{broker}, {number} streams: {asyncio.run(cell(broker, number, seconds, settings))}", flush=True)


async def cell(broker: str, streams: int, seconds: float, settings: Mapping[str, str]) -> str:
    """Let a worker have so many streams at once, and say how it went."""
    given = {"app_concurrency": streams + 32, "grace_seconds": 5, **settings}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with BROKERS[broker](LEASE) as urls, _distance(broker) as variables:
            late, calls = folder / "late", folder / "calls"
            module = [str(calls) if one == "{calls}" else one for one in WORKER]
            command = [sys.executable, "-m", *module, urls.requests, urls.responses, json.dumps(given), str(late)]
            with (folder / "log").open("wb") as log, child(command, stderr=log, env=os.environ | variables) as worker:
                try:
                    found, processor = await _run(worker, urls, streams, round(seconds / PAUSE))
                except BaseException:
                    sys.stderr.write((folder / "log").read_text(errors="replace")[-4000:])
                    raise
                worker.terminate()
                await asyncio.to_thread(worker.wait, 60)
            begun, ended = min(found.sent), max(found.sent)
            lags = [lag for due, lag in json.loads(late.read_text()) if begun <= due <= ended]
            sends = sum(number for call, number in json.loads(calls.read_text()).items() if call in SENDS)
            lost = (folder / "log").read_text().count("lease_lost")
    calls_each = sends / (len(found.sent) + len(found.ended) + len(found.plain) + 1)
    messages, chunks = len(found.sent), sum(len(one) for each in found.streams.values() for one in each.values())
    return (
        f"{messages / (ended - begun):,.0f} messages/s, {chunks / messages:.1f} chunks each,"
        f" {calls_each:.2f} calls each; ms from said to durable: first {_spread(found.first)},"
        f" later {_spread(found.rest)}; plain requests {_spread(found.plain.values())};"
        f" loop late by {_spread(lags)}; {100 * processor / (ended - begun):.0f} % of a core;"
        f" {ended - begun:.1f} s; {lost} leases lost"
    )


def _spread(found: Any) -> str:
    values = sorted(1000 * value for value in found)
    return f"{statistics.median(values):.0f}/{values[int(0.99 * len(values))]:.0f}/{values[-1]:.0f}"


@asynccontextmanager
async def _distance(broker: str) -> AsyncIterator[dict[str, str]]:
    """What the worker's environment has besides, so that its broker is as far as it is to be."""
    if broker != "pubsub-far":
        yield {}
        return
    from proxy import Proxy  # of the tests: `benchmarks.clouds` puts it on the path

    async with Proxy(os.environ["PUBSUB_EMULATOR_HOST"]) as proxy:
        proxy.delay(FAR_SECONDS)
        yield {"PUBSUB_EMULATOR_HOST": proxy.address}


async def _run(worker: subprocess.Popen[bytes], urls: Urls, streams: int, chunks: int) -> tuple[Found, float]:
    """Have it all said; return what came of it, and the seconds of the processor that the worker took for it."""
    found, process = Found(), psutil.Process(worker.pid)
    async with open_topic(urls.requests_in) as topic, open_subscription(urls.responses_out) as responses:

        async def until(done: Any) -> None:
            deadline = time.monotonic() + LIMIT
            while not done():
                if worker.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{len(found.ended)} of {streams} streams ended, {len(found.plain)} plain answers")
                messages = await responses.receive(responses.max_receive, 1.0)
                for message in messages:
                    found.take(message)
                await responses.ack(messages)

        await topic.publish([_plain(-1)])
        await until(lambda: found.plain)  # it has started
        found.plain.clear()
        before = sum(process.cpu_times()[:2])
        body = {"chunks": chunks, "pause": PAUSE}
        asked = {"path": "/talk", "body": body, "options": {"stream": True}}
        await topic.publish([_request(asked, stream=number) for number in range(streams)])
        plain = round(chunks * PAUSE / PLAIN_PAUSE)
        for number in range(plain):
            await topic.publish([_plain(number)])
            await asyncio.sleep(PLAIN_PAUSE)
        await asyncio.to_thread(until_quiet, process, time.monotonic() + LIMIT)
        took = sum(process.cpu_times()[:2]) - before
        await until(lambda: len(found.ended) == streams and len(found.plain) == plain and _whole(found, chunks))
        found.check(chunks)
    return found, took


def _whole(found: Found, chunks: int) -> bool:
    return all(sum(map(len, found.streams[number].values())) >= chunks for number in found.ended)


def _plain(number: int) -> Outgoing:
    return _request({"path": "/plain", "body": {"at": time.time()}}, plain=number)


def _request(asked: Mapping[str, Any], **metadata: int) -> Outgoing:
    return Outgoing(json.dumps({**asked, "metadata": metadata}).encode())
