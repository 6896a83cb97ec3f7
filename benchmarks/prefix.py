"""Requests that share a system prompt, with prefix sharing and without.

    uv run python -m benchmarks.prefix [--requests 1000] [--runs 3] [--prefix 400] [--model smollm2]

Each side is an engine in a fresh process, in turn, given every request at once: chat completions with one system
prompt of `--prefix` words, own parts of 4 to 24 words, greedy. A word is a token of smollm2, and about five of a random
model of `benchmarks.engine`. Measured from the first call to the last result, after one request that
warms it up. The tokens that the model took in are counted by the engine: unlike the times, they are exact. The texts
of both sides are compared.
"""

import argparse
import asyncio
import hashlib
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.engine import models
from rejoinder.worker.engines.protocol import EngineRequest

TEXT = """the river runs past old stones and a quiet mill where people met to talk of rain bread and long roads"""
SIDES = ("shared", "alone")


def requests(count: int, prefix: int, max_tokens: int) -> list[EngineRequest]:
    """Requests whose system prompt has `prefix` words, the same on every call."""
    chance, words = random.Random(23), TEXT.split()
    system = " ".join(chance.choice(words) for _ in range(prefix - 5)) + "."
    return [
        EngineRequest(
            "/v1/chat/completions",
            {
                "messages": [
                    {"role": "system", "content": system},
                    {"role": "user", "content": " ".join(chance.choice(words) for _ in range(chance.randint(4, 24)))},
                ],
                "max_tokens": max_tokens,
                "temperature": 0,
            },
            f"r{n}",
            0,
        )
        for n in range(count)
    ]


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process."""
    from rejoinder.worker.engines.transformers.engine import create

    config = {
        "model": models.directory(arguments.model),
        "threads": arguments.threads,
        "prefix_sharing": arguments.side == "shared",
    }
    if arguments.max_batch_tokens:
        config["max_batch_tokens"] = arguments.max_batch_tokens
    engine = create(config)
    await engine.start()
    try:
        await engine.generate(EngineRequest("/v1/completions", {"prompt": "Warm", "max_tokens": 2}, "w", 0))
        before, began = engine.stats, time.perf_counter()
        bodies = requests(arguments.requests, arguments.prefix, arguments.max_tokens)
        answers = await asyncio.gather(*map(engine.generate, bodies))
        seconds, stats = time.perf_counter() - began, engine.stats - before
    finally:
        await engine.stop()
    texts = json.dumps([answer["choices"] for answer in answers]).encode()
    return {
        "seconds": seconds,
        "tokens": stats.tokens,
        "occupancy": stats.occupancy,
        "prompts": sum(answer["usage"]["prompt_tokens"] for answer in answers),
        "texts": hashlib.sha256(texts).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--prefix", type=int, default=400)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--max-batch-tokens", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.side is not None:
        print(json.dumps(asyncio.run(measure(arguments))))
        return
    ratios: list[float] = []
    for number in range(1, arguments.runs + 1):
        shared, alone = (_run(side) for side in SIDES)
        ratios.append(alone["seconds"] / shared["seconds"])
        same = "the same" if shared["texts"] == alone["texts"] else "DIFFERENT"
        length = shared["prompts"] / arguments.requests
        sides = (
            f"{name} {side['seconds']:.1f} s, {side['tokens']} tokens computed, occupancy {side['occupancy']:.2f}"
            for name, side in zip(SIDES, (shared, alone), strict=True)
        )
        print(
            f"run {number}: {arguments.requests} prompts of {length:.0f} tokens: {'; '.join(sides)};"
            f" sharing is {ratios[-1]:.2f} times as fast, {same} texts",
            flush=True,
        )
    print(f"median of {arguments.runs}: {statistics.median(ratios):.2f} times as fast")


def _run(side: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.prefix", "--side", side, *sys.argv[1:]]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parents[1]).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
