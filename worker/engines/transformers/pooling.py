"""What the engines for embeddings and rerank share: an `Engine` that makes one row of numbers of each input."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from rejoinder.worker.engines.admission import MAX_CHARACTERS_PER_TOKEN, no_stream
from rejoinder.worker.engines.length_pool import Tokens
from rejoinder.worker.engines.protocol import EngineRequest, EngineStats
from rejoinder.worker.engines.transformers.forward import Forward, ForwardBatcher
from rejoinder.worker.engines.transformers.loading import context_of, load_as, tell
from rejoinder.worker.engines.transformers.settings import TransformersSettings
from rejoinder.worker.engines.transformers.sources import checkpoint_json
from rejoinder.worker.errors import EngineGone, Missing, RequestTooLarge, Unavailable

TEXT_THREADS = 2
"""Tokenization at once: enough to stay ahead of a model, few enough to leave it the processor."""
RUNNING = 256
"""Requests at once. They cost little more than their texts, and a batch is chosen out of all of them."""
CPU_BATCH_TOKENS = 512
"""all-MiniLM-L6-v2 on two cores: 4,200 tokens/s at 32 tokens a forward, 5,300 at 64, 6,100 at 128, 7,200 at 256, 7,500
at 512 and 7,400 at 4096. More would only make the next batch wait longer."""
GPU_BATCH_TOKENS = 16384
CPU_SLACK = 32
"""Tokens of padding that take as long as a forward of nothing: 4 ms there."""
GPU_SLACK = 1024

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that makes one row of each sequence."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    context: int
    """Tokens of one sequence, at most."""
    vocabulary: int
    """Token ids are below this."""

    def inputs(self, batch: Sequence[Tokens]) -> dict[str, torch.Tensor]:
        """The model's arguments for a batch, padded on the right, each `[sequences, longest]`."""
        longest = max(len(tokens.ids) for tokens in batch)

        def padded(rows: Sequence[list[int]], filler: int) -> torch.Tensor:
            lists = [row + [filler] * (longest - len(row)) for row in rows]
            return torch.tensor(lists, device=self.model.device)

        arguments = {
            "input_ids": padded([tokens.ids for tokens in batch], padding_id(self.model, self.tokenizer) or 0),
            "attention_mask": padded([[1] * len(tokens.ids) for tokens in batch], 0),
        }
        if all(tokens.types is not None for tokens in batch):
            arguments["token_type_ids"] = padded([tokens.types or [] for tokens in batch], 0)
        return arguments


def padding_id(model: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that batches are filled up with: the model's own, for some count their positions by it."""
    own: int | None = getattr(model.config.get_text_config(), "pad_token_id", None)
    return own if own is not None else tokenizer.pad_token_id


def load_pooling(kind: Any, settings: TransformersSettings) -> Loaded:
    """Load the model of an encoder-like task by one of transformers' auto classes.

    Raises:
        EngineGone: it cannot be loaded; the message says in one line what to do.
    """
    if settings.attn in {"varlen", "flash"}:
        raise EngineGone(f"attn {settings.attn} is of generation only: leave it out, or set sdpa or eager")
    options = {} if settings.attn == "auto" else {"attn_implementation": settings.attn}
    commits: dict[str, str] = {}
    model, tokenizer = load_as(lambda _: kind, settings, commits, **options)
    if model.config.is_encoder_decoder:
        raise EngineGone(f"the model {settings.model!r} is an encoder-decoder, which this engine does not serve")
    _encode(tokenizer, ["x"], None)  # sets padding and truncation off, which no other thread may see half done
    context = context_of(settings, _positions(model))
    if settings.max_model_len is None:
        trained = (checkpoint_json(settings, "sentence_bert_config.json") or {}).get("max_seq_length")
        context = min(context, tokenizer.model_max_length, trained or context)
    tell(settings, model, commits)
    return Loaded(model, tokenizer, context, model.config.get_text_config().vocab_size)


class PoolingEngine(ABC):
    """An `Engine` for one model that makes one row of numbers of each input.

    Args:
        settings: The model, and sizes. What is absent is chosen for the device.
        path: The one that it serves.
    """

    def __init__(self, settings: TransformersSettings, path: str) -> None:
        self._settings = settings
        self._path = path
        directory = Path(settings.model)
        own = directory.resolve().name if directory.is_dir() else settings.model
        self._served = settings.served_names or [own]
        self._pool = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self._batcher: ForwardBatcher | None = None
        self._stopped = False
        self._finished = 0

    @property
    def paths(self) -> frozenset[str]:
        """See `Engine.paths`."""
        return frozenset({self._path})

    @property
    def capacity(self) -> int:
        """Requests at once; see `Engine.capacity`."""
        return (self._settings.max_running or RUNNING) if self._running else 0

    @property
    def progress(self) -> int:
        """Forwards and requests done."""
        return self._finished + self.stats.steps

    @property
    def stats(self) -> EngineStats:
        """Forwards and their inputs. They have no places: the lengths of the inputs decide how many go together."""
        return self._batcher.stats if self._batcher else EngineStats()

    @property
    def _running(self) -> bool:
        return self._batcher is not None and not self._stopped and not self._batcher.broken.is_set()

    async def start(self) -> None:
        """Load the model; see `Engine.start`."""
        cpu = self._settings.device == "cpu" or (self._settings.device == "auto" and not torch.cuda.is_available())
        budget = self._settings.max_batch_tokens or (CPU_BATCH_TOKENS if cpu else GPU_BATCH_TOKENS)
        batcher = ForwardBatcher(budget, CPU_SLACK if cpu else GPU_SLACK)
        await batcher.load(self._ready)
        self._batcher = batcher

    async def generate(self, request: EngineRequest) -> Any:
        """Run one request; see `Engine.generate`."""
        if not self._running:
            raise Unavailable("the engine is not running")
        if request.path != self._path:
            raise Missing(f"{request.path} is not served; {self._path} is", param="path")
        no_stream(request, request.path)
        body = await self._answer(request)
        self._finished += 1
        return body

    async def wait_gone(self) -> None:
        """Return when the device can run nothing more."""
        if self._batcher is None:
            await asyncio.Event().wait()
        else:
            await self._batcher.broken.wait()

    async def stop(self) -> None:
        """Run nothing more; see `Engine.stop`."""
        self._stopped = True
        if self._batcher is not None:
            await self._batcher.stop()
        self._pool.shutdown(wait=False)  # not cancelling: who waits there would be cancelled with it, and not told

    def _ready(self) -> Forward:
        """Load the model and run it once: no request pays for what is done once, and one that cannot run is no engine.

        Raises:
            EngineGone: it cannot be loaded, or not run.
        """
        try:
            forward = self._load()
            if self._settings.warmup:
                forward([Tokens([0])])
        except EngineGone:
            raise
        except Exception as exc:
            first = str(exc).partition("\n")[0]
            raise EngineGone(f"the model {self._settings.model!r} does not run: {first}") from exc
        return forward

    @abstractmethod
    def _load(self) -> Forward:
        """Load the model; blocks."""

    @abstractmethod
    async def _answer(self, request: EngineRequest) -> Any:
        """The response's body."""

    async def _rows(self, sequences: Sequence[Tokens]) -> list[torch.Tensor]:
        if self._batcher is None:
            raise Unavailable("the engine is not running")
        return await self._batcher.run(sequences)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._stopped:
            raise Unavailable("the engine was stopped")
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def encode(loaded: Loaded, texts: Sequence[str], seconds: Sequence[str] | None = None) -> list[Tokens]:
    """The tokens of texts, or of pairs, with the special tokens that the model expects. Blocks."""
    return _encode(loaded.tokenizer, list(texts), None if seconds is None else list(seconds))


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], seconds: list[str] | None) -> list[Tokens]:
    encoded: Any = tokenizer(texts, seconds, add_special_tokens=True, padding=False, truncation=False)
    types = encoded.get("token_type_ids") if seconds is not None else None
    return [Tokens(ids, types[at] if types else None) for at, ids in enumerate(encoded["input_ids"])]


def check_text(characters: int, loaded: Loaded, param: str) -> None:
    """Refuse a text that cannot fit whatever its tokens are: tokenizing it would take seconds and gigabytes.

    Raises:
        RequestTooLarge: it is that long.
    """
    if characters > loaded.context * MAX_CHARACTERS_PER_TOKEN:
        raise _too_long(f"{param} has {characters} characters", loaded, param)


def check_length(tokens: Tokens, loaded: Loaded, param: str, what: str = "") -> None:
    """Refuse a sequence that the model does not take whole; nothing is cut off silently.

    Args:
        tokens: The sequence.
        loaded: The model.
        param: The field at fault.
        what: The sequence in words, where it is more than the field.

    Raises:
        RequestTooLarge: it is longer than the model's context.
    """
    if len(tokens.ids) > loaded.context:
        raise _too_long(f"{what or param} has {len(tokens.ids)} tokens", loaded, param)


def _too_long(what: str, loaded: Loaded, param: str) -> RequestTooLarge:
    return RequestTooLarge(
        f"{what}; at most {loaded.context} tokens are allowed", param=param, code="context_length_exceeded"
    )


def _positions(model: Any) -> int | None:
    """How many positions the model knows. RoBERTa and its kin count theirs from behind the padding token's id."""
    known: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings - module.padding_idx - 1)
    return known
