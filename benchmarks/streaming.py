"""What a stream costs: the time to its first chunk through a worker, and the speed of a batch that streams.

    uv run python -m benchmarks.streaming [--runs 20] [--model smollm2] [--batch 32] [--batch-runs 5]

First chunk: one chat at a time, in turn to an engine in this process and to `rejoinder worker`, a process of its own
with its engine in another, over queues of the embedded broker (SQLite). Here it is the time from `generate` to the
first chunk, there from the publish to the receipt of the stream's first message. Each run has a prompt of its own,
which neither side has in its cache.

Speed: `--batch` completions at once, streamed and not, in turn, in the worker's engine process alone.
"""

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.engine import models
from rejoinder.adapters import Outgoing, Subscription, Topic, open_subscription, open_topic
from rejoinder.worker.engines.protocol import Engine, EngineRequest

TEXT = """the river runs past old stones and a quiet mill where people met to talk of rain bread and long roads"""
FACTORY = "rejoinder.worker.engines.transformers.engine:create"
LIMIT = 120.0


def chat(number: int, max_tokens: int) -> dict[str, Any]:
    """A conversation of about 60 tokens, another one for each number, that has the same on every call."""
    chance, words = random.Random(number), TEXT.split()
    said = " ".join(chance.choice(words) for _ in range(30))
    turns = [{"role": "user", "content": f"{number}: tell me of {said}"}]
    return {"messages": turns, "max_tokens": max_tokens, "temperature": 0}


async def in_engine(engine: Engine, number: int, max_tokens: int) -> float:
    """Milliseconds to the first chunk of the engine itself."""
    first: list[float] = []
    request = EngineRequest("/v1/chat/completions", chat(number, max_tokens), f"r{number}", 0)
    request.emit = lambda _: first.append(time.perf_counter())
    began = time.perf_counter()
    await engine.generate(request)
    return (first[0] - began) * 1000


async def through_worker(topic: Topic, responses: Subscription, number: int, max_tokens: int) -> float:
    """Milliseconds from the publish to the receipt of the first message; all of the stream is taken."""
    envelope = {
        "path": "/v1/chat/completions",
        "metadata": {"n": number},
        "body": chat(number, max_tokens),
        "options": {"stream": True},
    }
    first = None
    began = time.perf_counter()
    await topic.publish([Outgoing(json.dumps(envelope).encode())])
    async with asyncio.timeout(LIMIT):
        while True:
            batch = await responses.receive(100, 5)
            now = time.perf_counter()
            for message in batch:
                said = json.loads(message.body)
                if said["metadata"] != {"n": number} or said["status_code"] != 200:
                    raise SystemExit(f"another answer came: {said}")
                first = first or now
            await responses.ack(batch)
            if any(json.loads(message.body)["stream"]["done"] for message in batch):
                return ((first or now) - began) * 1000


@asynccontextmanager
async def worker(model: str, threads: int) -> AsyncIterator[tuple[Topic, Subscription]]:
    """A worker process that has served once, its requests and its responses."""
    with tempfile.TemporaryDirectory() as folder:
        base = f"sqlite:///{Path(folder) / 'bench.db'}"
        queues = {"requests": f"{base}?queue=requests", "responses": f"{base}?queue=responses"}
        process = subprocess.Popen(
            [sys.executable, "-m", "rejoinder.cli.main", "worker", "--model", model, f"--threads={threads}"]
            + [f"--{name}={url}" for name, url in queues.items()]
        )
        try:
            async with open_topic(queues["requests"]) as topic, open_subscription(queues["responses"]) as responses:
                await through_worker(topic, responses, -1, 4)
                yield topic, responses
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


async def first_chunks(arguments: argparse.Namespace) -> None:
    """Print the medians of both sides."""
    from rejoinder.worker.engines.transformers.engine import create

    engine = create({"model": arguments.model, "threads": arguments.threads})
    await engine.start()
    try:
        async with worker(arguments.model, arguments.threads) as (topic, responses):
            await in_engine(engine, -1, 4)
            bare, through = [], []
            for number in range(arguments.runs):
                bare.append(await in_engine(engine, number, arguments.max_tokens))
                through.append(await through_worker(topic, responses, number, arguments.max_tokens))
                print(f"run {number}: {bare[-1]:.1f} ms, {through[-1]:.1f} ms", file=sys.stderr, flush=True)
    finally:
        await engine.stop()
    more = statistics.median(b - a for a, b in zip(bare, through, strict=True))
    print(
        f"time to the first chunk, medians of {arguments.runs}: {statistics.median(bare):.1f} ms in the engine,"
        f" {statistics.median(through):.1f} ms through a worker: {more:.1f} ms more,"
        f" {statistics.median(through) / statistics.median(bare):.2f} times"
    )


async def speed(arguments: argparse.Namespace) -> None:
    """Print the tokens per second of a batch, streamed and not."""
    from rejoinder.worker.engines.host import EngineProcess

    engine = EngineProcess(FACTORY, {"model": arguments.model, "threads": arguments.threads})
    await engine.start()
    rates: dict[bool, list[float]] = {False: [], True: []}
    try:
        for run in range(-1, arguments.batch_runs):
            for streamed in (False, True):
                rate, chunks = await _batch(engine, arguments, streamed=streamed)
                if run >= 0:  # the first of each warms it up
                    rates[streamed].append(rate)
                    print(f"streamed {streamed}: {rate:.1f} tokens/s, {chunks} chunks", file=sys.stderr, flush=True)
    finally:
        await engine.stop()
    ratio = statistics.median(b / a for a, b in zip(rates[False], rates[True], strict=True))
    print(
        f"{arguments.batch} at once, medians of {arguments.batch_runs}: {statistics.median(rates[False]):.1f} tokens/s"
        f" in one piece, {statistics.median(rates[True]):.1f} streamed; median ratio {ratio:.2f}"
    )


async def _batch(engine: Engine, arguments: argparse.Namespace, *, streamed: bool) -> tuple[float, int]:
    chunks: list[Any] = []
    requests = [
        EngineRequest("/v1/chat/completions", chat(number, arguments.max_tokens), f"r{number}", 0)
        for number in range(arguments.batch)
    ]
    for request in requests:
        request.emit = chunks.append if streamed else None
    began = time.perf_counter()
    answers = await asyncio.gather(*map(engine.generate, requests))
    seconds = time.perf_counter() - began
    return sum(answer["usage"]["completion_tokens"] for answer in answers) / seconds, len(chunks)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batch-runs", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    arguments.model = models.directory(arguments.model)
    if arguments.runs:
        asyncio.run(first_chunks(arguments))
    if arguments.batch_runs:
        asyncio.run(speed(arguments))


if __name__ == "__main__":
    main()
