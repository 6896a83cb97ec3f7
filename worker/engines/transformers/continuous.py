"""transformers' continuous batching as one coroutine for each sequence, with what its traps need around it.

A bad request would end its generation thread and with it every request in flight: `admission` refuses what is known to,
`Recovery` finds the rest. A thread that has ended stays so here: the engine process ends too, and its host starts a new
one.
"""

import asyncio
import queue
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, cast
from uuid import uuid4

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

from rejoinder.worker.engines.capacity import CacheCapacity
from rejoinder.worker.engines.protocol import EngineStats
from rejoinder.worker.engines.stall import StallWatch
from rejoinder.worker.engines.transformers.attention import choose, in_force
from rejoinder.worker.engines.transformers.batch import CPU_RUNNING, GPU_RUNNING, Generated, generated
from rejoinder.worker.engines.transformers.counting import CountingScheduler, size_of
from rejoinder.worker.engines.transformers.loading import LoadedModel
from rejoinder.worker.engines.transformers.recovery import Recovery
from rejoinder.worker.engines.transformers.sampling import Sampling, SamplingProcessors, followed
from rejoinder.worker.engines.transformers.settings import TransformersSettings
from rejoinder.worker.errors import EngineGone, Failed, RetryableError, Unavailable

CPU_BATCH_TOKENS = 256
CPU_CACHE_BYTES = 2**30
CPU_PAGE_SIZE = 32
GPU_MEMORY_SHARE = 0.8
"""What transformers takes where scores are processed. It would take 0.9, for it does not see our sampling yet."""
STOP_SECONDS = 2.0
COMPILE_LEVELS = {"none": 0, "default": 1, "max": 2, "max-static": 3}
"""transformers' own: 2 tries out kernels, 3 compiles for each shape by itself."""
AHEAD = 0.25
"""Of the places in the batch, sequences admitted beyond them. The generation thread begins its next step at once,
before a finished sequence's place could be given away, so without a queue at its door each place would stand empty for
a step: 6 % of the work at 16 tokens an answer. More would only keep requests from other workers."""


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
        self.ahead = AHEAD
        try:
            choose(loaded.model, settings.attn, compiled=settings.compile != "none")
            self._manager = _manager(loaded.model, settings, self.running)
            self._manager.warmup()  # allocates the cache: what does not fit fails here, not in the first request
        except (ValueError, RuntimeError, AttributeError, KeyError, ImportError, MemoryError) as exc:
            first = str(exc).partition("\n")[0]
            raise EngineGone(f"continuous batching cannot serve {settings.model!r} as configured: {first}") from exc
        cache: Any = self._manager.batch_processor.cache  # type: ignore[union-attr]  # warmup made it
        self.longest = infer_max_single_request_tokens(cache)
        """Tokens of one sequence, at most, by the size of the cache."""
        if self.longest < 2:
            raise EngineGone("the KV cache holds less than two tokens: set a larger cache_bytes")
        self._size = partial(size_of, cache)
        # A prompt as long as its answer may be; but no longer than one can be.
        assumed = min(settings.default_max_tokens, loaded.context // 2, self.longest // 2)
        self._capacity = CacheCapacity(self._size(assumed + assumed // 2), assumed)
        scheduler = self._manager.batch_processor.scheduler  # type: ignore[union-attr]
        self._scheduler = cast("CountingScheduler", scheduler)
        self.dynamic = _sees_history(self._manager)
        """Whether each step sees its sequences as they are."""
        Recovery(self._manager)
        self._unfinished: set[asyncio.Future[list[int]]] = set()
        self._stalls = StallWatch(settings.stall_seconds, self._position, lambda: self.steps)

    def start(self) -> None:
        """Start the generation thread. It is no daemon: `stop` it."""
        self._manager.start()

    def stop(self) -> None:
        """End the generation thread after its current step; sequences in flight raise `Unavailable`. Blocks."""
        self._manager.stop(block=True, timeout=STOP_SECONDS, hard_stop=True)
        # It tells those in its batch and at its door, but not those that it was just letting in.
        for done in list(self._unfinished):
            done.get_loop().call_soon_threadsafe(_end, done)

    @property
    def alive(self) -> bool:
        """Whether the generation thread runs and takes sequences."""
        return self._manager.is_running() and self._manager.background_thread_status.can_accept_new_requests() is None

    @property
    def steps(self) -> int:
        """Steps done."""
        return int(getattr(self._manager, "current_batch", 0))

    @property
    def fits(self) -> int:
        """Sequences at once that the cache has room for, of lengths like those seen lately."""
        return min(self.running, self._capacity.fits(self._scheduler.use))

    @property
    def stats(self) -> EngineStats:
        """What it has done."""
        return self._scheduler.stats

    async def run(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop: Callable[[list[int]], bool] | None = None,
        stop_tokens: Collection[int] = (),
    ) -> Generated:
        """Generate one sequence; see `Batch.run`."""
        brought = followed(sampling, prompt)
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
                try:
                    # One token at a time, so that the end does not depend on how outputs were gathered.
                    end = next((n for n in range(seen + 1, len(tokens) + 1) if stop(tokens[:n])), None)
                except Exception as exc:  # noqa: BLE001  # raised here it would lose the other sequences' outputs
                    done.set_exception(exc)
                    return
                seen = len(tokens)
                if end is not None:
                    done.set_result(tokens[:end])
            if output.is_finished() and not done.done():
                done.set_result(tokens)

        self._manager.register_result_handler(name, on_output)
        self._stalls.add(name, done)
        self._unfinished.add(done)
        try:
            added = self._manager.add_request(
                list(prompt),
                request_id=name,
                max_new_tokens=max_new_tokens,
                streaming=stop is not None,
                eos_token_id=sorted(self._eos.union(stop_tokens)) or None,
                **brought,
            )
            if added is None or not self.alive:  # the thread may have ended between looking and adding: it tells nobody
                raise Unavailable("the engine is ending")
            tokens = await done
            self._capacity.saw(self._size(len(prompt) + len(tokens) // 2), len(tokens))
            return generated(tokens, brought)
        finally:
            self._unfinished.discard(done)
            self._forget(name)

    def _forget(self, name: str) -> None:
        """Take a sequence that is not finished out of the batch. Cancelling alone would leave its handler behind."""
        self._stalls.remove(name)
        if self._manager.output_router.result_handlers.pop(name, None) is not None:
            self._manager.cancel_request(name)

    def _position(self, name: str) -> int | None:
        """How many tokens of a sequence are in the cache; None where it waits."""
        processor = self._manager.batch_processor
        state = processor.scheduler.active_requests.get(name) if processor else None
        return None if state is None else state.position_offset

    def _failure(self, error: str | RetryableError) -> RetryableError:
        if isinstance(error, RetryableError):
            return error
        first = error.partition("\n")[0]
        if self.alive:
            return Failed(f"the engine failed on this request: {first}")
        return Unavailable(f"the engine failed on its whole batch ({first})")


def _end(done: "asyncio.Future[list[int]]") -> None:
    if not done.done():
        done.set_exception(Unavailable("the engine was stopped"))


def _manager(model: PreTrainedModel, settings: TransformersSettings, running: int) -> ContinuousBatchingManager:
    cpu = model.device.type == "cpu"
    page_size = settings.page_size or (CPU_PAGE_SIZE if cpu else ContinuousBatchingConfig().page_size)
    cache_bytes = settings.cache_bytes or (CPU_CACHE_BYTES if cpu else None)
    config = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=None if cache_bytes is None else max(1, cache_bytes // (page_size * _bytes_per_token(model))),
        max_batch_tokens=settings.max_batch_tokens or (CPU_BATCH_TOKENS if cpu else None),
        max_requests_per_batch=running,
        scheduler_type=CountingScheduler.NAME,
        auto_switch_to_flash=False,  # it may download compiled code from the hub and run it, unasked
        max_memory_percent=settings.cache_memory_share or (None if cpu else GPU_MEMORY_SHARE),
        use_cuda_graph=settings.cuda_graphs,
        use_async_batching=settings.async_batching,
        default_compile_level=COMPILE_LEVELS[settings.compile],
        allow_block_sharing=settings.prefix_sharing,
        max_queue_size=0,  # a full queue blocks its caller, the event loop; our slots bound it instead
    )
    # Not the checkpoint's own: its sampling would be for every request, its penalties are dropped anyway.
    generation = GenerationConfig(do_sample=False, eos_token_id=-1)  # type: ignore[no-untyped-call]
    manager: ContinuousBatchingManager = model.init_continuous_batching(  # type: ignore[operator]  # an untyped mixin's
        generation_config=generation, continuous_batching_config=config
    )
    if settings.compile != "none" and not _compiled(manager):
        raise ValueError(
            f"compile is {settings.compile}, but with attn {in_force(model)} no step is compiled: set attn to sdpa"
        )
    manager.output_router.output_queue = _Nobody()
    manager.logit_processor = SamplingProcessors(static=_static(manager))
    return manager


def _static(manager: ContinuousBatchingManager) -> bool:
    """Whether steps are recorded or compiled."""
    return _compiled(manager) or any(manager.continuous_batching_config.cuda_graph_booleans)


def _compiled(manager: ContinuousBatchingManager) -> bool:
    config = manager.continuous_batching_config
    return config.varlen_compile_config is not None or config.decode_compile_config is not None


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
