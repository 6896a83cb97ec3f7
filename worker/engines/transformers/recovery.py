"""A step of the batch that fails is undone and done again in halves, so that one sequence fails and not all.

The failed step's sequences stay where they are: their tokens and cache pages are kept, and what the step wrote to the
cache is written again, at the same places. Noise is a function of the position, so results stay the same.
"""

import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus

from rejoinder.worker.engines.transformers.faults import (
    is_device_lost,
    is_out_of_memory,
    no_number,
    out_of_memory,
    where,
)
from rejoinder.worker.engines.transformers.sampling import SamplingProcessors
from rejoinder.worker.engines.transformers.scheduling import ResumingScheduler, Scheduled
from rejoinder.worker.errors import Failed, RetryableError

HOPELESS = 8
"""Sequences that fail alone one after another, with no step that succeeds between: the fault is not theirs."""
RESTARTS = 3
"""A sequence with a sliding window is prefilled anew at most so often; see `_undo`."""
NO_TOKEN = -1
"""In place of a row's token: its logits had no largest number."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a step failed, as the error of the sequence that is to blame."""

    error: RetryableError
    reason: str
    """For the log."""
    memory: bool = False
    """A smaller step might do."""


class Recovery:
    """Stands around the steps of a manager that is warmed up and not started.

    What it does not serve stays as it was, the engine process ends and its requests come back: steps made before the
    last one's tokens are known, those recorded as CUDA graphs or compiled, a device that is lost, and an error outside
    the step.
    """

    def __init__(self, manager: ContinuousBatchingManager) -> None:
        processor: Any = manager.batch_processor
        self._io: Any = processor.inputs_and_outputs
        self._scheduler: ResumingScheduler = processor.scheduler
        self._router = manager.output_router
        self._processors: SamplingProcessors = manager.logit_processor  # type: ignore[assignment]
        self._device = manager.model.device
        window = getattr(manager.model.config.get_text_config(), "sliding_window", None)
        self._window: int | None = window if "sliding_attention" in processor.cache.cache_allocators else None
        self._given_up = 0  # since the last step that succeeded
        if self._processors.static or processor.use_async_batching:
            return
        self._body, outer = manager._generation_loop_body, cast("Any", manager)
        outer._generation_loop_body = self._guarded
        self._results, self._io.prepare_batch_update = self._io.prepare_batch_update, self._checked
        runner = processor.model_runner
        self._choose, runner._sample = runner._sample, self._marked

    def _guarded(self, processor: Any, bootstrapping: bool) -> bool:
        """One round of the generation thread."""
        try:
            return self._body(processor, bootstrapping)
        except Exception as exc:
            if not self._scheduler.step or is_device_lost(exc):
                raise
            fault = _fault(exc)
        # Only here, where the exception is gone and with its traceback the tensors of the step that failed.
        self._halve(fault)
        return True

    def _halve(self, fault: Fault) -> None:
        """Undo the step under way and have it done again in halves, or give up the one sequence in it."""
        scheduler = self._scheduler
        step, scheduler.step = scheduler.step, []
        sizes = [(part.state.request_id, part.tokens) for part in step]
        if scheduler.halving.group is None:
            tokens = sum(size for _, size in sizes)
            _log.warning("a step of %d sequences, %d tokens, is done again: %s", len(step), tokens, fault.reason)
        guilty = scheduler.halving.failed(sizes, memory=fault.memory)
        for part in step:
            if not self._undo(part) or part.state.request_id == guilty:
                self._give_up(part.state, fault.error)
        if guilty is not None:
            self._given_up += 1
            if self._given_up >= HOPELESS:
                raise RuntimeError(f"{self._given_up} sequences failed one after another: {fault.error}")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _undo(self, part: Scheduled) -> bool:
        """Put a sequence back to where it was before the step; False where that has been done too often.

        A step writes to the cache behind what it reads, except where a layer has a sliding window: there the pages are
        a ring, and several tokens at once overwrite some that the first of them reads. Such a sequence begins anew.
        """
        state, position = part.state, part.position
        if self._window and part.tokens > 1 and position and position + part.tokens > self._window:
            state.restarts = restarts = getattr(state, "restarts", 0) + 1  # type: ignore[attr-defined]
            if restarts > RESTARTS:
                return False
            position = 0
        left = (state.initial_tokens + state.generated_tokens)[position:]
        state.position_offset = position
        if len(left) == 1:
            state.status, state.tokens_to_process, state.remaining_prefill_tokens = RequestStatus.DECODING, left, []
        else:
            state.status, state.tokens_to_process, state.remaining_prefill_tokens = RequestStatus.PREFILLING, [], left
        return True

    def _give_up(self, state: RequestState, error: RetryableError) -> None:
        self._scheduler.finish_request(state.request_id)
        self._scheduler.block_new_requests = False
        state.status = RequestStatus.FAILED
        output = state.to_generation_output()  # type: ignore[no-untyped-call]
        output.error = error  # transformers only passes it on
        self._router.deliver(output)

    def _marked(self, scores: Tensor, output_ids: Tensor) -> None:
        """Choose the tokens. The mark goes to the host with them, so that looking for it costs no wait of its own."""
        self._choose(scores, output_ids)
        unusable = self._processors.unusable
        output_ids[0, : len(unusable)].masked_fill_(unusable, NO_TOKEN)

    def _checked(self) -> tuple[list[FutureRequestState], list[int], Any]:
        """The step's sequences and tokens, less those that got none."""
        requests, tokens, logprobs = self._results()
        step = self._scheduler.step
        # One whose prompt goes on in the next step has no token: the rows are the others', in order.
        rows = [request.state.request_id for request in requests if request.has_new_token]
        bad = {name for name, token in zip(rows, tokens, strict=False) if token == NO_TOKEN}
        if bad and len(step) > 1 and self._io.attention_mask is not None:
            # Under one mask for all a value that is no number reaches the neighbours: 0 times NaN is NaN.
            self._halve(_no_number())
            return [], [], None
        self._scheduler.step = []  # from here on the step cannot be undone
        self._scheduler.halving.succeeded(sum(part.tokens for part in step))
        self._given_up = 0
        if bad:
            kept = [n for n, name in enumerate(rows) if name not in bad]
            tokens = [tokens[n] for n in kept]
            logprobs = None if logprobs is None else [logprobs[n] for n in kept]
            for state in [request.state for request in requests if request.state.request_id in bad]:
                self._give_up(state, _no_number().error)
            requests = [request for request in requests if request.state.request_id not in bad]
        return requests, tokens, logprobs


def _no_number() -> Fault:
    """A new one for each sequence: what is raised keeps its traceback."""
    return Fault(no_number(), "no number")


def _fault(error: Exception) -> Fault:
    if is_out_of_memory(error):
        return Fault(out_of_memory(), "out of memory", memory=True)
    return Fault(Failed(f"the engine failed on this request: {type(error).__name__}"), where(error))
