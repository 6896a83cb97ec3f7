"""transformers' continuous batching as one coroutine for each sequence, with what its traps need around it.

One bad request ends its generation thread and with it every request in flight (docs say which; `admission` refuses
them). A thread that has ended stays so here: the engine process ends too, and its host starts a new one.
"""

import asyncio
import math
import queue
from collections.abc import Callable, Collection, Sequence
from typing import Any
from uuid import uuid4

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from rejoinder.worker.engines.transformers_attention import choose
from rejoinder.worker.engines.transformers_batch import CPU_RUNNING, GPU_RUNNING, Generated
from rejoinder.worker.engines.transformers_loading import LoadedModel
from rejoinder.worker.engines.transformers_penalties import History
from rejoinder.worker.engines.transformers_sampling import Sampling, SamplingProcessors
from rejoinder.worker.engines.transformers_settings import TransformersSettings
from rejoinder.worker.errors import EngineGone, Failed, Unavailable

CPU_BATCH_TOKENS = 256
CPU_CACHE_BYTES = 2**30
CPU_PAGE_SIZE = 32
STOP_SECONDS = 2.0
AHEAD = 0.25
"""Of the places in the batch, sequences admitted beyond them. The generation thread begins its next step at once,
before a finished sequence's place could be given away, so without a queue at its door each place would stand empty for
a step: 6 % of the work at 16 tokens an answer. More would only keep requests from other workers."""


class ResumingScheduler(FIFOScheduler):
    """transformers' own, but a cancelled sequence makes room for waiting ones as a finished one does.

    When the cache is full, transformers puts a sequence back and lets no other one in until a sequence ends by itself.
    Stop strings, timeouts and lost leases end ours from outside: without this the batch would wait for ever.
    """

    NAME = "rejoinder"

    def clear_cancelled_requests(self) -> list[RequestState]:
        """As transformers' own. Called in the generation thread, before each step."""
        cancelled = super().clear_cancelled_requests()
        if cancelled:
            self.block_new_requests = False
        return cancelled


SCHEDULER_MAPPING[ResumingScheduler.NAME] = ResumingScheduler


class _Nobody(queue.Queue[Any]):
    """Where outputs go whose sequence has been taken out meanwhile. transformers would keep them for ever."""

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Drop it."""


class ContinuousBatch:
    """A `Batch` that each sequence joins and leaves at any step.

    Args:
        loaded: The model. Its attention may be switched to one that suits.
        settings: Sizes. What is absent is chosen for the device.
    """

    def __init__(self, loaded: LoadedModel, settings: TransformersSettings) -> None:
        self._eos = loaded.eos
        cpu = loaded.model.device.type == "cpu"
        self.running = settings.max_running or (CPU_RUNNING if cpu else GPU_RUNNING)
        """Sequences at once, at most."""
        self.ahead = math.ceil(self.running * AHEAD)
        """Sequences that wait at its door."""
        try:
            choose(loaded.model, settings.attn)
            self._manager = _manager(loaded.model, settings, self.running)
            self._manager.warmup()  # allocates the cache: what does not fit fails here, not in the first request
        except (ValueError, RuntimeError, AttributeError, KeyError) as exc:
            first = str(exc).partition("\n")[0]
            raise EngineGone(f"continuous batching cannot serve {settings.model!r} as configured: {first}") from exc
        cache: Any = self._manager.batch_processor.cache  # type: ignore[union-attr]  # warmup made it
        self.longest = infer_max_single_request_tokens(cache)
        """Tokens of one sequence, at most, by the size of the cache."""
        self.penalties = _sees_history(self._manager)
        """Whether sequences may have penalties."""
        if self.longest < 2:
            raise EngineGone("the KV cache holds less than two tokens: set a larger cache_bytes")

    def start(self) -> None:
        """Start the generation thread. It is no daemon: `stop` it."""
        self._manager.start()

    def stop(self) -> None:
        """End the generation thread after its current step; sequences in flight raise `Unavailable`. Blocks."""
        self._manager.stop(block=True, timeout=STOP_SECONDS, hard_stop=True)

    @property
    def alive(self) -> bool:
        """Whether the generation thread runs and takes sequences."""
        return self._manager.is_running() and self._manager.background_thread_status.can_accept_new_requests() is None

    @property
    def steps(self) -> int:
        """Steps done."""
        return int(getattr(self._manager, "current_batch", 0))

    async def run(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop: Callable[[list[int]], bool] | None = None,
        stop_tokens: Collection[int] = (),
    ) -> Generated:
        """Generate one sequence; see `Batch.run`."""
        name = uuid4().hex  # never the message's own: a redelivery may meet its first delivery
        done: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        seen = 0

        def on_output(output: Any) -> None:
            nonlocal seen
            if done.done():
                return
            tokens: list[int] = output.generated_tokens
            if output.error is not None:
                done.set_exception(self._failure(output.error))
            elif stop is not None:
                # One token at a time, so that the end does not depend on how outputs were gathered.
                end = next((n for n in range(seen + 1, len(tokens) + 1) if stop(tokens[:n])), None)
                seen = len(tokens)
                if end is not None:
                    done.set_result(tokens[:end])
            if output.is_finished() and not done.done():
                done.set_result(tokens)

        self._manager.register_result_handler(name, on_output)
        try:
            added = self._manager.add_request(
                list(prompt),
                request_id=name,
                max_new_tokens=max_new_tokens,
                streaming=stop is not None,
                eos_token_id=sorted(self._eos.union(stop_tokens)) or None,
                **_chosen_by(sampling, prompt),
            )
            if added is None:
                raise Unavailable("the engine is ending; the request will be tried again")
            return Generated(await done)
        finally:
            self._forget(name)

    def _forget(self, name: str) -> None:
        """Take a sequence that is not finished out of the batch. Cancelling alone would leave its handler behind."""
        if self._manager.output_router.result_handlers.pop(name, None) is not None:
            self._manager.cancel_request(name)

    def _failure(self, error: str) -> Failed | Unavailable:
        first = error.partition("\n")[0]
        if self.alive:
            return Failed(f"the engine failed on this request: {first}")
        return Unavailable(f"the engine failed on its whole batch ({first}); the request will be tried again")


def _manager(model: PreTrainedModel, settings: TransformersSettings, running: int) -> ContinuousBatchingManager:
    cpu = model.device.type == "cpu"
    page_size = settings.page_size or (CPU_PAGE_SIZE if cpu else ContinuousBatchingConfig().page_size)
    cache_bytes = settings.cache_bytes or (CPU_CACHE_BYTES if cpu else None)
    config = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=None if cache_bytes is None else max(1, cache_bytes // (page_size * _bytes_per_token(model))),
        max_batch_tokens=settings.max_batch_tokens or (CPU_BATCH_TOKENS if cpu else None),
        max_requests_per_batch=running,
        scheduler_type=ResumingScheduler.NAME,
        auto_switch_to_flash=False,  # it may download compiled code from the hub and run it, unasked
        use_cuda_graph=settings.cuda_graphs,
        max_queue_size=0,  # a full queue blocks its caller, the event loop; our slots bound it instead
    )
    # Not the checkpoint's own: its sampling would be for every request, its penalties are dropped anyway.
    generation = GenerationConfig(do_sample=False, eos_token_id=-1)  # type: ignore[no-untyped-call]
    manager: ContinuousBatchingManager = model.init_continuous_batching(  # type: ignore[operator]  # an untyped mixin's
        generation_config=generation, continuous_batching_config=config
    )
    manager.output_router.output_queue = _Nobody()
    manager.logit_processor = SamplingProcessors(static=_static(manager))
    return manager


def _chosen_by(sampling: Sampling, prompt: Sequence[int]) -> dict[str, Any]:
    """What a request brings for `SamplingProcessors`."""
    history = {"history": History(prompt, sampling.penalties)} if sampling.penalties.active else {}
    return {"sampling": sampling, **history}


def _static(manager: ContinuousBatchingManager) -> bool:
    """Whether steps are recorded or compiled."""
    config = manager.continuous_batching_config
    compiled = config.varlen_compile_config is not None or config.decode_compile_config is not None
    return compiled or any(config.cuda_graph_booleans)


def _sees_history(manager: ContinuousBatchingManager) -> bool:
    """Whether each step is made knowing all tokens before it: an asynchronous one is made before the last is known."""
    processors: Any = manager.logit_processor
    return not processors.static and not manager.continuous_batching_config.use_async_batching


def _bytes_per_token(model: PreTrainedModel) -> int:
    """Of the KV cache, all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * torch.empty(0, dtype=model.dtype).element_size())
