"""Which sequences are in the next step: transformers' own scheduler, with what it lacks."""

from dataclasses import dataclass
from typing import Any

from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from rejoinder.worker.engines.halving import Halving


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One sequence's part in the step under way."""

    state: RequestState
    position: int
    """Tokens of it that were in the cache before the step."""
    tokens: int
    """Of the step."""


class ResumingScheduler(FIFOScheduler):
    """transformers' own, first come first served, with three differences. All of it is the generation thread's.

    A *cancelled* sequence makes room for waiting ones as a finished one does. When the cache is full, transformers puts
    a sequence back and lets no other one in until a sequence ends by itself. Stop strings, timeouts and lost leases end
    ours from outside: without this the batch would wait for ever.

    *Nobody overtakes*: a sequence that was put back waits before all new ones, and none is let in after one for whose
    tokens there is no room yet. transformers puts it at the end and lets in whatever fits, so that a long prompt among
    short ones could wait for ever, or be begun and put back for ever.

    *A failed step* is done again in halves: `halving` says who may be in the next one. While steps are limited all take
    turns.
    """

    def reset(self) -> None:
        """As transformers' own; called by its constructor too."""
        super().reset()
        self.halving = Halving()
        self.step: list[Scheduled] = []
        """Empty where no step is under way."""

    def clear_cancelled_requests(self) -> list[RequestState]:
        """As transformers' own. Called before each step."""
        cancelled = super().clear_cancelled_requests()
        if cancelled:
            self.block_new_requests = False
        return cancelled

    def add_waiting_request(self, state: RequestState) -> None:
        """As transformers' own, but what was running already comes first."""
        super().add_waiting_request(state)
        if state._true_initial_tokens or state.is_cpu_offloaded:
            self.waiting_requests_order.rotate(1)

    def _get_waiting_candidates(self) -> list[RequestState]:
        next_ones, fitting = self._next_ones()
        if next_ones and not fitting and self.cache.evict_cached_blocks():
            self.cache.pool.try_to_free_sectors()
            next_ones, fitting = self._next_ones()
        # The first of an idle batch is let in whatever it needs: transformers makes room for that one.
        return next_ones[: fitting if self.active_requests else max(1, fitting)]

    def _next_ones(self) -> tuple[list[RequestState], int]:
        """The waiting sequences that one step could begin, and how many of them, in order, find room.

        Room is that for the whole of a prompt, besides what those need whose prompts are being prefilled. No more are
        looked at than there are places and tokens in a step: looking hashes the prompt, if pages are shared.
        """
        begun = [state for state in self.active_requests.values() if state.status == RequestStatus.PREFILLING]
        needed = [self._needed(state, 0) for state in begun]
        next_ones: list[RequestState] = []
        places, tokens = self.max_requests_per_batch - len(self.active_requests), self.cache.max_batch_tokens
        for name in self.waiting_requests_order:
            if len(next_ones) >= places or tokens <= 0:
                break
            state = self.waiting_requests[name]
            shared = self._shared(state)
            next_ones.append(state)
            needed.append(self._needed(state, shared))
            tokens -= len(state.remaining_prefill_tokens) - shared
        return next_ones, max(0, self.cache.count_storable_requests(needed) - len(begun))

    def _needed(self, state: RequestState, shared: int) -> dict[str, int]:
        """Blocks of each kind of cache for what is left of a prompt, less its first tokens that it shares."""
        tokens = len(state.remaining_prefill_tokens)
        return {
            name: allocator.needs_new_blocks(state.request_id, state.position_offset, tokens)
            - shared // allocator.tokens_per_page
            for name, allocator in self.cache.cache_allocators.items()
        }

    def _shared(self, state: RequestState) -> int:
        """How many of a waiting sequence's first tokens are in the cache already, in pages that it can share."""
        if not self.cache.use_prefix_sharing or state.is_cpu_offloaded:
            return 0
        left = state.remaining_prefill_tokens
        return min(len(a.match_prefix_blocks(left)) * a.tokens_per_page for a in self.cache.cache_allocators.values())

    def _process_candidates(
        self, candidates: list[RequestState], token_budget: int, cache_budget: int, removed: set[str]
    ) -> Any:
        while (group := self.halving.group) is not None:
            members = [state for state in candidates if state.request_id in group.names]
            tokens = min(token_budget, group.tokens)
            found = super()._process_candidates(members, tokens, cache_budget, removed)
            if found[0]:
                break
            self.halving.drop()
        else:
            tokens = self.halving.limit(token_budget)
            found = super()._process_candidates(candidates, tokens, cache_budget, removed)
        self.step = [Scheduled(f.state, f.state.position_offset, f.query_length) for f in found[0]]
        if self.halving.limited:
            for scheduled in self.step:
                name = scheduled.state.request_id
                self.active_requests[name] = self.active_requests.pop(name)
        return found
