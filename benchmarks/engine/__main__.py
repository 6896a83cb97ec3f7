"""Tokens per second of a worker with a backlog, over bare `generate_batch` on the same prompts in one process.

    uv run python -m benchmarks.engine [--models smollm2 random-6m] [--variants default attn=sdpa batching=static]
        [--loads "short, uniform" ...] [--requests 64] [--runs 1]

Every side runs the same model greedily over the same prompts with the same cache, batch and page sizes, each in a fresh
process, in turn. The bare side has transformers' own attention; it is measured after its model is loaded and its cache
made. The worker takes texts where the bare side takes token ids; it is measured from the moment that its engine is
ready, when the backlog lies in its queue, to the moment that the broker takes the last response. A variant is a list of
the worker's settings, joined by `+`, such as `attn=varlen+cuda_graphs=true`; `default` has none. Tokens are counted:
in float32 each side must have as many as the bare one, or the row says so. Each cell has two ratios, of tokens per
second and of tokens per second of the processor, of all processes together: the second is the steadier one where the
machine is shared, and means little on a GPU.

On a GPU: `--models random-1b random-3b random-8b --loads realistic --requests 512`, and the variants that are to be
compared (docs/gpu.md).
"""

import argparse
import asyncio
import json
import platform
import statistics
import subprocess
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.engine import bare, loads, models, through_worker

CPU_LOADS = ["short, uniform", "short, skewed", "512, uniform", "512, skewed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="+", default=["smollm2", "random-6m"])
    parser.add_argument("--loads", nargs="+", default=CPU_LOADS, choices=list(loads.LOADS))
    parser.add_argument("--variants", nargs="+", default=["default", "attn=sdpa", "batching=static"])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--runs", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(_side(arguments.side, arguments.models[0], arguments.loads[0], arguments.requests)))
        return
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    # Wide enough for every column, wherever the output goes.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(
        f"{device}, torch {torch.__version__}, transformers {transformers.__version__}, Python"
        f" {platform.python_version()}; {arguments.requests} requests, median of {arguments.runs}"
    )
    table = Table("model", "load", "tokens", "bare tokens/s", *[f"{variant} / bare" for variant in arguments.variants])
    for model in arguments.models:
        models.directory(model)  # made before anything is measured
        for load in arguments.loads:
            table.add_row(model, load, *_row(model, load, arguments))
    console.print(table)


def _row(model: str, load: str, arguments: argparse.Namespace) -> list[str]:
    rates: dict[str, list[float]] = {side: [] for side in ("bare", *arguments.variants)}
    frugal: dict[str, list[float]] = {side: [] for side in rates}  # tokens per second of the processor
    tokens: dict[str, int] = {}
    for _ in range(arguments.runs):
        for side, found in rates.items():
            result = _process(side, model, load, arguments.requests)
            found.append(result["tokens"] / result["seconds"])
            frugal[side].append(result["tokens"] / result["processor"])
            tokens[side] = result["tokens"]
            print(f"{model}, {load}, {side}: {found[-1]:.1f} tokens/s", file=sys.stderr, flush=True)
    ratios = [
        f"{_ratio(rates, variant):.2f}, {_ratio(frugal, variant):.2f}"
        + ("" if tokens[variant] == tokens["bare"] else f" ({tokens[variant]} tokens)")
        for variant in arguments.variants
    ]
    return [str(tokens["bare"]), f"{statistics.median(rates['bare']):.1f}", *ratios]


def _ratio(rates: dict[str, list[float]], variant: str) -> float:
    return statistics.median(a / b for a, b in zip(rates[variant], rates["bare"], strict=True))


def _process(side: str, model: str, load: str, requests: int) -> dict[str, Any]:
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine", "--side", side, "--models", model, "--loads", load]
        + ["--requests", str(requests)],
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def _side(side: str, model: str, load: str, count: int) -> dict[str, Any]:
    from transformers import AutoTokenizer

    path = models.directory(model)
    requests = loads.prompts(load, count, AutoTokenizer.from_pretrained(path))
    if side == "bare":
        return bare.run(path, requests)
    settings = [] if side == "default" else side.split("+")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (setting.split("=", 1) for setting in settings)]
    return asyncio.run(through_worker.run(path, requests, flags))


if __name__ == "__main__":
    main()
