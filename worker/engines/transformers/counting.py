"""What a continuous batch does, counted where it is decided: in the scheduler, step by step."""

import time
from typing import Any

from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from rejoinder.worker.engines.capacity import CacheUse
from rejoinder.worker.engines.protocol import EngineStats
from rejoinder.worker.engines.transformers.scheduling import ResumingScheduler


class CountingScheduler(ResumingScheduler):
    """Counts, here because all of it runs in the generation thread: other threads read what is complete."""

    NAME = "rejoinder"

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.stats = EngineStats()
        """Of all steps so far."""
        self.use = self._use()
        """The cache before the last step."""
        self._looked = time.perf_counter()
        self._working = True  # time counts from the first look on

    def clear_cancelled_requests(self) -> list[RequestState]:
        """Called before each step, or every 0.1 s without one."""
        cancelled = super().clear_cancelled_requests()
        now = time.perf_counter()
        if not self._working:
            self.stats += EngineStats(idle_seconds=now - self._looked)
        self._looked = now
        self._working = self.has_pending_requests()
        self.use = self._use()
        return cancelled

    def schedule_batch(
        self, token_budget: int, cache_budget: int
    ) -> tuple[list[FutureRequestState] | None, bool, int, int]:
        """As transformers' own."""
        batch = super().schedule_batch(token_budget, cache_budget)
        sequences, _, tokens, _ = batch
        self._working = sequences != []  # none although some wait: the thread rests; None: it makes room and asks again
        if sequences:
            self.stats += EngineStats(1, len(sequences), self.max_requests_per_batch, tokens)
        return batch

    def _use(self) -> CacheUse:
        """The cache now, in bytes."""
        cache = self.cache
        allocators = cache.cache_allocators.values()
        kept = sum(len(one.ledger.cached_blocks) * one.bytes_per_block for one in allocators)
        held = sum(sum(map(len, one.block_table.values())) * one.bytes_per_block for one in allocators)
        return CacheUse(
            free=cache.compute_free_capacity(relative=False) + kept,
            margin=self.safety_margin * cache.num_sectors * cache.bytes_per_sector,
            held=held,
            sequences=max(len(one.block_table) for one in allocators),
        )


SCHEDULER_MAPPING[CountingScheduler.NAME] = CountingScheduler


def size_of(cache: PagedAttentionCache, tokens: int) -> int:
    """Bytes that one sequence of so many tokens takes in a cache."""
    return sum(one.needs_new_blocks("", 0, tokens) * one.bytes_per_block for one in cache.cache_allocators.values())
