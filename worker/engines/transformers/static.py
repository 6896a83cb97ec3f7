"""Static batching: `model.generate` over what is waiting, for models that continuous batching does not serve.

Sampling is that of continuous batching, by position, so a sequence's tokens are the same in float32 whichever of the
two runs it, whoever its neighbours are, and when a batch that failed is run again in parts.
"""

import logging
import threading
import time
from asyncio import AbstractEventLoop, get_running_loop
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from rejoinder.worker.engines.gathering import Bounds, gather
from rejoinder.worker.engines.protocol import EngineStats
from rejoinder.worker.engines.transformers.attention import choose
from rejoinder.worker.engines.transformers.batch import CPU_RUNNING, GPU_RUNNING, Generated, generated
from rejoinder.worker.engines.transformers.faults import is_device_lost, is_out_of_memory, out_of_memory, where
from rejoinder.worker.engines.transformers.loading import LoadedModel
from rejoinder.worker.engines.transformers.probe import Together, model_inputs, rows_together
from rejoinder.worker.engines.transformers.rows import News, Row, Steps, take
from rejoinder.worker.engines.transformers.sampling import Sampling, followed
from rejoinder.worker.engines.transformers.settings import TransformersSettings
from rejoinder.worker.errors import EngineGone, Failed, RetryableError, Unavailable

CPU_CACHE_BYTES = 2**30
GPU_CACHE_SHARE = 0.7
"""Of the memory that is free once the model is loaded. The rest is for activations."""
GAP_SECONDS = 0.002
"""While sequences arrive at most this far apart, a batch that is not full waits for more: one that starts with the
first of a burst alone keeps all the others waiting to its end. 32 requests at once took 20 % fewer steps for it, and
a backlog never waits."""
GATHER_SECONDS = 0.01
"""At most so long."""

log = logging.getLogger(__name__)


class StaticBatch:
    """A `Batch` of `model.generate` calls, one after the other. Rows end at any step, and join between batches.

    Args:
        loaded: The model, a decoder of any kind or an encoder-decoder.
        settings: Sizes. What is absent is chosen for the device.

    Raises:
        EngineGone: the model cannot be run so; the message says why.
    """

    def __init__(self, loaded: LoadedModel, settings: TransformersSettings) -> None:
        self._model = loaded.model
        self._eos = loaded.eos
        cpu = loaded.model.device.type == "cpu"
        self.running = settings.max_running or (CPU_RUNNING if cpu else GPU_RUNNING)
        """Sequences at once, at most."""
        self.ahead = 1.0
        """The next batch waits as a whole: places become free all at once."""
        self.dynamic = True
        """Each step knows all tokens before it."""
        _prepare(loaded.model, settings)
        self._start_token: int | None = getattr(loaded.model.generation_config, "decoder_start_token_id", None)
        try:
            together = rows_together(loaded.model)
        except (ValueError, RuntimeError, AttributeError, KeyError, TypeError) as exc:
            first = str(exc).partition("\n")[0]
            raise EngineGone(f"static batching cannot serve {settings.model!r} as configured: {first}") from exc
        if together is not Together.PADDED:
            log.warning("this model computes %s; batches are smaller for it", together.value)
        tokens = _cached_tokens(loaded.model, settings.cache_bytes, settings.cache_memory_share or GPU_CACHE_SHARE)
        self._bounds = Bounds(
            rows=1 if together is Together.ALONE else self.running,
            tokens=tokens,
            prompt_tokens=settings.max_batch_tokens,
            padding=together is Together.PADDED,
        )
        # What of an encoder-decoder is in the cache at once is more than what its limit is about.
        self.longest = loaded.context if tokens is None or self._start_token is not None else tokens
        """Tokens of one sequence, at most."""
        if self.longest < 2:
            raise EngineGone("the KV cache holds less than two tokens: set a larger cache_bytes")
        self.stats = EngineStats()
        """See `Batch.stats`."""
        self._changed = threading.Condition()
        self._waiting: list[Row] = []
        self._arrived = 0.0
        self._rows: set[Row] = set()  # of the event loop's thread alone
        self._loop: AbstractEventLoop | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="static-batching")

    @property
    def fits(self) -> int:
        """See `Batch.fits`: batches are made to fit."""
        return self.running

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.stats.steps

    def start(self) -> None:
        """Start the generation thread. It is no daemon: `stop` it."""
        self._thread.start()

    def stop(self) -> None:
        """End the generation thread after its current step; sequences in flight raise `Unavailable`. Blocks."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the generation thread runs and takes sequences."""
        return self._thread.is_alive() and not self._stopping

    async def run(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop: Callable[[list[int]], bool] | None = None,
        stop_tokens: Collection[int] = (),
    ) -> Generated:
        """Generate one sequence; see `Batch.run`."""
        loop = get_running_loop()
        initial = list(prompt) if self._start_token is None else [self._start_token]
        brought = followed(sampling, initial)
        ends = self._eos.union(stop_tokens)
        row = Row(list(prompt), max_new_tokens, ends, stop, initial, brought, loop.create_future())
        with self._changed:
            if not self.alive:
                raise Unavailable("the engine is ending")
            self._loop = loop
            self._rows.add(row)
            self._waiting.append(row)
            self._arrived = time.monotonic()
            self._changed.notify()
        try:
            return generated(await row.result, brought)
        finally:
            row.ended = True
            self._rows.discard(row)
            with self._changed:
                if row in self._waiting:
                    self._waiting.remove(row)

    def _work(self) -> None:
        """The generation thread."""
        try:
            while rows := self._next():
                self._run_parts(rows)
        except Exception as exc:  # noqa: BLE001  # the device is lost, or this file is wrong: the engine ends
            log.error("static batching has ended: %s", where(exc))
        finally:
            with self._changed:
                self._stopping = True  # who comes now is refused; who came before is told
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._abandon)

    def _abandon(self) -> None:
        for row in self._rows:
            if not row.result.done():
                row.result.set_exception(Unavailable("the engine has ended"))

    def _next(self) -> list[Row]:
        """The rows of the next batch, once there are any; none where the thread is to end."""
        with self._changed:
            began = 0.0
            idle = time.monotonic()
            while not self._stopping:
                left = None
                if self._waiting:
                    began = began or time.monotonic()
                    left = min(self._arrived + GAP_SECONDS, began + GATHER_SECONDS) - time.monotonic()
                    if left <= 0 or len(self._waiting) >= self._bounds.rows:
                        break
                self._changed.wait(left)
                if not began:
                    idle = self._idled(idle)
            if self._stopping:
                return []
            places = set(gather([(len(row.prompt), row.limit) for row in self._waiting], self._bounds))
            chosen = [row for place, row in enumerate(self._waiting) if place in places]
            self._waiting = [row for place, row in enumerate(self._waiting) if place not in places]
            return chosen

    def _idled(self, since: float) -> float:
        """Count the time without any row; return from when the next is counted."""
        now = time.monotonic()
        self.stats += EngineStats(idle_seconds=now - since)
        return now

    def _run_parts(self, rows: list[Row]) -> None:
        """Run a batch; one that fails is run again in halves, down to the row that fails alone."""
        parts = [rows]
        while parts and not self._stopping:
            part = [row for row in parts.pop() if not row.ended]
            error = self._run(part) if part else None
            if error is None:
                continue
            if len(part) == 1:
                self._tell([(part[0], len(part[0].generated_tokens), error)])
                part[0].ended = True
            else:
                half = len(part) // 2
                parts += [part[half:], part[:half]]

    def _run(self, rows: list[Row]) -> RetryableError | None:
        """Generate until all rows have ended. The error, where it fails: nothing of the failed call is held then."""
        steps = Steps(rows, self._model.device, self._after_step)
        prompts = sum(len(row.prompt) - 1 for row in rows)  # each step counts one token of each row
        self.stats += EngineStats(tokens=prompts)
        try:
            with torch.inference_mode():
                self._model.generate(  # type: ignore[operator]  # an untyped mixin's
                    **model_inputs(self._model, [row.prompt for row in rows]),
                    max_new_tokens=max(row.limit for row in rows),
                    logits_processor=[steps.draw],
                    stopping_criteria=[steps.end],
                )
        except Exception as exc:  # a row's own failure, whatever it is, is answered by itself
            if not is_out_of_memory(exc):
                if is_device_lost(exc):  # not a row's failure
                    raise
                if len(rows) == 1:
                    log.warning("the model failed on one sequence alone: %s", where(exc))
                return Failed(f"the engine failed on this request: {type(exc).__name__}")
        else:
            return None
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        return out_of_memory()

    def _after_step(self, news: list[News], sequences: int) -> bool:
        self.stats += EngineStats(1, sequences, self.running, sequences)
        self._tell(news)
        return not self._stopping

    def _tell(self, news: list[News]) -> None:
        """Hand over to the event loop what is new of some rows."""
        if news and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(take, news)


def _prepare(model: PreTrainedModel, settings: TransformersSettings) -> None:
    """Attention as configured, and none of the checkpoint's own ideas of sampling and beams."""
    if settings.attn == "varlen":
        raise EngineGone("attn is varlen, which only continuous batching has: set attn to auto")
    if settings.attn != "auto":
        try:
            choose(model, settings.attn)
        except ValueError as exc:
            raise EngineGone(f"attn is {settings.attn}, which {settings.model!r} cannot have: {exc}") from exc
    own: Any = model.generation_config
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        bos_token_id=own.bos_token_id,
        # Where an answer begins; some models' translations are into the language that they say.
        decoder_start_token_id=_start_token(model),
        forced_bos_token_id=own.forced_bos_token_id,
        bad_words_ids=own.bad_words_ids,  # Marian's padding token, which it would say otherwise
        suppress_tokens=own.suppress_tokens,
        begin_suppress_tokens=own.begin_suppress_tokens,
    )


def _start_token(model: PreTrainedModel) -> int | None:
    """What the decoder of an encoder-decoder begins with."""
    if not model.config.is_encoder_decoder:
        return None
    own: Any = model.generation_config
    known = (own.decoder_start_token_id, getattr(model.config, "decoder_start_token_id", None), own.bos_token_id)
    start = next((token for token in known if token is not None), None)
    if not isinstance(start, int):
        raise EngineGone("the model's generation config does not say which token the decoder begins with")
    return start


def _cached_tokens(model: PreTrainedModel, cache_bytes: int | None, gpu_share: float) -> int | None:
    """Tokens that the cache may hold; None where they are not what fills the memory: a state has one size."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if not heads:
        return None
    if cache_bytes is None:
        device = model.device
        free = torch.cuda.mem_get_info(device)[0] * gpu_share if device.type == "cuda" else CPU_CACHE_BYTES
        cache_bytes = int(free)
    layers = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = int(2 * (layers or config.num_hidden_layers) * heads * size)
    return max(1, cache_bytes // (values * torch.empty(0, dtype=model.dtype).element_size()))
