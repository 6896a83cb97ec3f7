"""Tokens per second of a worker with a backlog, over bare `generate_batch` on the same prompts in one process.

    uv run python -m benchmarks.generate [--prompts 200] [--runs 3] [--model smollm2]

Both sides run the same model greedily over the same prompts of mixed lengths with the same cache, batch and page
sizes, each in a fresh process, in turn. The bare side is measured after its model is loaded and its cache is made, from
the call of `generate_batch` to its return; the worker from the moment that its engine is ready, when the backlog lies
in its queue, to the moment that the broker takes the last response. The tokens are counted and compared.
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
from datetime import datetime
from pathlib import Path
from typing import Any

from rejoinder.adapters import Outgoing, open_subscription, open_topic
from rejoinder.worker.settings import user_cache_dir

TEXT = """the river runs past old stones and a quiet mill where people met to talk of rain bread and long roads"""
LIMIT = 1200.0


def prompts(count: int) -> list[str]:
    """Prompts of 4 to 160 words, skewed to the short, the same on every call."""
    chance, words = random.Random(17), TEXT.split()
    return [
        " ".join(chance.choice(words) for _ in range(int(4 + 156 * chance.random() ** 3))).capitalize()
        for _ in range(count)
    ]


def bare(model: str, count: int, max_tokens: int) -> dict[str, Any]:
    """`generate_batch` in this process, with the sizes that the engine chooses and transformers' own attention."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    from rejoinder.worker.engines.factory import transformers_config
    from rejoinder.worker.engines.smollm2 import ensure
    from rejoinder.worker.engines.transformers_continuous import ContinuousBatch
    from rejoinder.worker.engines.transformers_loading import load
    from rejoinder.worker.engines.transformers_settings import TransformersSettings
    from rejoinder.worker.settings import Settings

    config = transformers_config(Settings(requests="memory://a", responses="memory://b", model=model))
    del config["cache"]
    if model == "smollm2":
        config["model"] = str(ensure(user_cache_dir()))
    settings = TransformersSettings(**config)
    sizes = ContinuousBatch(load(settings), settings)._manager.continuous_batching_config
    loaded = load(settings)  # anew: the engine puts its own attention into a model, and this is without it
    cb = ContinuousBatchingConfig(
        num_blocks=sizes.num_blocks,
        max_batch_tokens=sizes.max_batch_tokens,
        page_size=sizes.page_size,
        max_requests_per_batch=sizes.max_requests_per_batch,
    )
    generation = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=sorted(loaded.eos),
        pad_token_id=min(loaded.eos),
    )
    inputs = [loaded.tokenizer.encode(text) for text in prompts(count)]
    call = {"generation_config": generation, "continuous_batching_config": cb, "persistent_manager": True}
    loaded.model.generate_batch(inputs[:2], **call)
    began = time.perf_counter()
    outputs = loaded.model.generate_batch(inputs, **call)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": sum(len(output.generated_tokens) for output in outputs.values())}


async def worker(model: str, count: int, max_tokens: int) -> dict[str, Any]:
    """The same prompts through `rejoinder worker`."""
    with tempfile.TemporaryDirectory() as folder:
        base = f"sqlite:///{Path(folder) / 'bench.db'}"
        requests, responses = f"{base}?queue=requests", f"{base}?queue=responses"
        async with open_topic(requests) as topic:
            bodies = [{"prompt": text, "max_tokens": max_tokens, "temperature": 0} for text in prompts(count)]
            await topic.publish(
                [Outgoing(json.dumps({"metadata": {"n": n}, "body": body}).encode()) for n, body in enumerate(bodies)]
            )
        log = Path(folder) / "worker.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "rejoinder.cli.main", "worker", "--model", model, "--log-format", "json"]
                + ["--requests", requests, "--responses", responses],
                stderr=stderr,
            )
        try:
            return await _measured(responses, count, log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


async def _measured(responses: str, count: int, log: Path) -> dict[str, Any]:
    tokens, last = 0, 0.0
    deadline = time.monotonic() + LIMIT
    async with open_subscription(responses) as subscription:
        got = 0
        while got < count:
            if time.monotonic() > deadline:
                raise SystemExit(f"{got} of {count} responses came in {LIMIT:g} s: {log.read_text()}")
            for message in (batch := await subscription.receive(100, 5)):
                tokens += json.loads(message.body)["body"]["usage"]["completion_tokens"]
                last = max(last, message.sent_at or 0.0)
            await subscription.ack(batch)
            got += len(batch)
    ready = next(
        datetime.fromisoformat(event["timestamp"]).timestamp()
        for event in map(json.loads, (line for line in log.read_text().splitlines() if line.startswith("{")))
        if event["event"] == "engine_ready"
    )
    return {"seconds": last - ready, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["bare", "worker"], help=argparse.SUPPRESS)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.side == "bare":
        print(json.dumps(bare(arguments.model, arguments.prompts, arguments.max_tokens)))
        return
    if arguments.side == "worker":
        print(json.dumps(asyncio.run(worker(arguments.model, arguments.prompts, arguments.max_tokens))))
        return
    ratios: list[float] = []
    for number in range(1, arguments.runs + 1):
        result = {side: _run(side, arguments) for side in ("worker", "bare")}
        rates = {side: found["tokens"] / found["seconds"] for side, found in result.items()}
        ratios.append(rates["worker"] / rates["bare"])
        same = "the same" if result["worker"]["tokens"] == result["bare"]["tokens"] else "DIFFERENT"
        print(
            f"run {number}: worker {rates['worker']:.1f} tokens/s, bare generate_batch {rates['bare']:.1f} tokens/s,"
            f" ratio {ratios[-1]:.3f}, {same} number of tokens ({result['worker']['tokens']})",
            flush=True,
        )
    print(f"median of {arguments.runs}: ratio {statistics.median(ratios):.3f}")


def _run(side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.generate", "--side", side, "--model", arguments.model]
        + ["--prompts", str(arguments.prompts), "--max-tokens", str(arguments.max_tokens)],
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
