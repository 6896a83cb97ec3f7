"""What a chat's stream costs: the time to its first chunk through a worker, and the speed of a batch that streams."""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

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


class Stamped:
    """The engine, which notes for each stream how long its first chunk took. It runs in the engine process."""

    def __init__(self, engine: Engine, notes: str) -> None:
        self._engine = engine
        self._notes = notes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, request: EngineRequest) -> Any:
        """As the engine does."""
        began, emit = time.perf_counter(), request.emit
        first: list[float] = []

        def stamped(chunk: Any) -> None:
            first.append(time.perf_counter())
            emit(chunk)  # type: ignore[misc]  # asked below

        request.emit = stamped if emit else None
        answer = await self._engine.generate(request)
        if first:
            await asyncio.to_thread(Path(self._notes).write_text, repr((first[0] - began) * 1000))
        return answer


def create(config: dict[str, Any]) -> Any:
    """The engine of the worker that is measured."""
    from rejoinder.worker.engines.transformers.engine import create as create_engine

    return Stamped(create_engine({name: config[name] for name in config if name != "notes"}), config["notes"])


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


async def first_chunks(arguments: argparse.Namespace) -> None:
    """Print the medians, both of the same requests."""
    from rejoinder.worker.engines.host import EngineProcess
    from rejoinder.worker.service import StopSignals, serve
    from rejoinder.worker.settings import Settings

    with tempfile.TemporaryDirectory() as folder:
        base, notes = f"sqlite:///{Path(folder) / 'bench.db'}", Path(folder) / "first"
        queues = {"requests": f"{base}?queue=requests", "responses": f"{base}?queue=responses"}
        config = {"model": arguments.model, "threads": arguments.threads, "notes": str(notes)}
        signals = StopSignals()
        settings = Settings(**queues, model=arguments.model)
        engine = EngineProcess("benchmarks.streaming.chat:create", config)
        worker = asyncio.create_task(serve(settings, signals, engine))
        bare, through = [], []
        async with open_topic(queues["requests"]) as topic, open_subscription(queues["responses"]) as responses:
            for number in range(-1, arguments.runs):
                took = await through_worker(topic, responses, number, arguments.max_tokens)
                if number >= 0:  # the first one waited for the model
                    bare.append(float(notes.read_text()))
                    through.append(took)
                    print(f"run {number}: {bare[-1]:.1f} ms, {took:.1f} ms", file=sys.stderr, flush=True)
        signals.receive("SIGTERM")
        await worker
    more = statistics.median(b - a for a, b in zip(bare, through, strict=True))
    times = statistics.median(b / a for a, b in zip(bare, through, strict=True))
    print(
        f"time to the first chunk, medians of {arguments.runs}: {statistics.median(bare):.1f} ms in the engine,"
        f" {statistics.median(through):.1f} ms through a worker: {more:.1f} ms more, {times:.2f} times"
    )


async def speed(arguments: argparse.Namespace) -> None:
    """Print the tokens per second of a batch, streamed and not."""
    from rejoinder.worker.engines.host import EngineProcess

    engine = EngineProcess(FACTORY, {"model": arguments.model, "threads": arguments.threads})
    await engine.start()
    rates: dict[bool, list[float]] = {False: [], True: []}
    frugal: dict[bool, list[float]] = {False: [], True: []}  # tokens per second of the processor
    try:
        for run in range(-1, arguments.batch_runs):
            for streamed in (False, True):
                rate, processor, chunks = await _batch(engine, arguments, streamed=streamed)
                if run >= 0:  # the first of each warms it up
                    rates[streamed].append(rate)
                    frugal[streamed].append(processor)
                    said = f"{rate:.1f} tokens/s, {processor:.1f} of the processor, {chunks} chunks"
                    print(f"streamed {streamed}: {said}", file=sys.stderr, flush=True)
    finally:
        await engine.stop()
    clock, processor = (_ratio(found) for found in (rates, frugal))
    print(
        f"{arguments.batch} at once, medians of {arguments.batch_runs}: {statistics.median(rates[False]):.1f} tokens/s"
        f" in one piece; streamed {clock:.2f} of it by the clock, {processor:.3f} by the processor"
    )


def _ratio(found: dict[bool, list[float]]) -> float:
    return statistics.median(b / a for a, b in zip(found[False], found[True], strict=True))


async def _batch(engine: Engine, arguments: argparse.Namespace, *, streamed: bool) -> tuple[float, float, int]:
    chunks: list[Any] = []
    requests = [
        EngineRequest("/v1/chat/completions", chat(number, arguments.max_tokens), f"r{number}", 0)
        for number in range(arguments.batch)
    ]
    for request in requests:
        request.emit = chunks.append if streamed else None
    began, processor = time.perf_counter(), _processor_seconds()
    answers = await asyncio.gather(*map(engine.generate, requests))
    seconds, processor = time.perf_counter() - began, _processor_seconds() - processor
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    return tokens / seconds, tokens / processor, len(chunks)


def _processor_seconds() -> float:
    """Of this process and all below it, so far."""
    this = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in [this, *this.children(recursive=True)])


async def each_token(model: str) -> None:
    """Print what a token of a stream costs."""
    from transformers import AutoTokenizer

    from rejoinder.worker.engines import chunks
    from rejoinder.worker.engines.frames import encode
    from rejoinder.worker.engines.transformers.deltas import Deltas
    from rejoinder.worker.engines.transformers.text import Text

    text = Text(AutoTokenizer.from_pretrained(model), frozenset())
    tokens = text.encode(TEXT * 20)[:400]
    chunks.INTERVAL = 0.0
    for every in (1, 8):
        found = []
        for _ in range(20):
            deltas = Deltas(text, ())
            told = chunks.Chunks(
                EngineRequest("/v1/chat/completions", {}, "r", 0),
                lambda chunk: encode({"kind": "chunk", "id": 1, "body": chunk}),
                "model",
                chat=True,
            )
            began = time.process_time()
            for end in range(1, len(tokens) + 1):
                deltas.push(tokens[:end])
                if end % every == 0:
                    told.more(0, deltas.take)
            found.append((time.process_time() - began) / len(tokens))
        print(f"a chunk for {every} tokens: {statistics.median(found) * 1e6:.1f} us of a processor for each token")
