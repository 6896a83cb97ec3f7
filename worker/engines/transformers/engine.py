"""The engine for models that generate text: `/v1/completions` and `/v1/chat/completions`."""

import asyncio
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from rejoinder.worker.engines import admission, sequences
from rejoinder.worker.engines.admission import Limits
from rejoinder.worker.engines.answers import Choice, Place
from rejoinder.worker.engines.capacity import Average
from rejoinder.worker.engines.chunks import Chunks
from rejoinder.worker.engines.protocol import Engine, EngineRequest, EngineStats
from rejoinder.worker.engines.sequences import SHARE, Body, Planned
from rejoinder.worker.engines.token_bytes import TokenBytes
from rejoinder.worker.engines.transformers.batch import Batch, Generated
from rejoinder.worker.engines.transformers.choice import choose_batch
from rejoinder.worker.engines.transformers.deltas import Deltas
from rejoinder.worker.engines.transformers.grammar import Grammar, Grammars
from rejoinder.worker.engines.transformers.loading import load, tell
from rejoinder.worker.engines.transformers.penalties import Penalties
from rejoinder.worker.engines.transformers.sampling import Sampling
from rejoinder.worker.engines.transformers.settings import TransformersSettings
from rejoinder.worker.engines.transformers.text import Text, cut
from rejoinder.worker.errors import EngineGone, Failed, Unavailable

TEXT_THREADS = 2
"""Tokenization and detokenization at once: enough to stay ahead of a model, few enough to leave it the processor."""
WARMUP_TOKENS = 8
"""Prompt and new ones together: a prefill and some steps after it."""
WATCH_SECONDS = 0.25
"""How soon the end of the generation thread is noticed where no request was in flight to tell."""
STOPPED = "the engine was stopped"

T = TypeVar("T")


def create(config: Mapping[str, Any]) -> Engine:
    """The engine for a config of `TransformersSettings`. Nothing is loaded yet.

    Raises:
        pydantic.ValidationError: the config breaks a rule.
    """
    return TransformersEngine(TransformersSettings.model_validate(dict(config)))


class TransformersEngine:
    """An `Engine` for one generating model in this process."""

    def __init__(self, settings: TransformersSettings) -> None:
        self._settings = settings
        path = Path(settings.model)
        self._served = settings.served_names or [path.resolve().name if path.is_dir() else settings.model]
        self._pool = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self._started = self._stopped = False
        self._width = Average(1.0)
        self._finished = 0

    @property
    def paths(self) -> frozenset[str]:
        """Chat only where the model has a chat template."""
        chat = {"/v1/chat/completions"} if self._started and self._text.has_chat_template else set()
        return frozenset({"/v1/completions"} | chat)

    @property
    def capacity(self) -> int:
        """Requests whose sequences fit in the batch now or wait at its door: a free place is filled at the next step.

        Of the length and the number of sequences that requests usually have.
        """
        if not self._started or self._stopped or not self._batch.alive:
            return 0
        return max(1, math.ceil(self._admitted(self._batch.fits) / self._width.value))

    @property
    def progress(self) -> int:
        """Steps of the model and requests done."""
        return self._finished + (self._batch.steps if self._started else 0)

    @property
    def stats(self) -> EngineStats:
        """What the batch has done."""
        return self._batch.stats if self._started else EngineStats()

    async def start(self) -> None:
        """Load the model; see `Engine.start`."""
        await asyncio.to_thread(self._load)
        # As many as ever fit, not as fit now: the batch itself lets a sequence wait until there is room in its cache.
        self._slots = asyncio.Semaphore(self._admitted(self._batch.running))
        self._batch.start()
        try:
            if self._settings.warmup:
                await self._warm_up()
        except BaseException:  # cancelling above all: the thread that was started is no daemon
            await asyncio.to_thread(self._batch.stop)
            raise
        self._started = True

    def _admitted(self, places: int) -> int:
        return places + math.ceil(places * self._batch.ahead)

    async def _warm_up(self) -> None:
        """Generate a little of each kind, so that no request pays for what is done once.

        Raises:
            EngineGone: it cannot: then it could not for any request.
        """
        tokens = min(WARMUP_TOKENS, self._limits.sequence)
        prompt = [n % self._limits.vocabulary for n in range(max(1, tokens // 2))]
        kinds = [Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=40, top_p=0.9)]
        try:
            await sequences.together([self._batch.run(prompt, max(1, tokens - len(prompt)), kind) for kind in kinds])
        except (Failed, Unavailable) as exc:
            raise EngineGone(f"the model {self._settings.model!r} does not generate: {exc}") from exc

    def _load(self) -> None:
        loaded = load(self._settings)
        self._text = Text(loaded.tokenizer, loaded.eos)
        self._bytes = TokenBytes(loaded.tokenizer)
        self._grammars = Grammars(loaded.tokenizer, loaded.vocabulary, loaded.eos)
        self._batch: Batch = choose_batch(loaded, self._settings)
        self._limits = Limits(
            sequence=min(loaded.context, self._batch.longest),
            vocabulary=loaded.vocabulary,
            default_max_tokens=self._settings.default_max_tokens,
            dynamic=self._batch.dynamic,
            separate=loaded.model.config.is_encoder_decoder,
        )
        tell(self._settings, loaded.model, loaded.commits)

    async def generate(self, request: EngineRequest) -> Any:
        """Run one request; see `Engine.generate`."""
        if not self._started or self._stopped:
            raise Unavailable("the engine is not running")
        body = admission.parse_body(request.path, request.body)
        model = admission.served_name(body.model, self._served)
        admission.check_sampling(body, self._limits)
        prompts = await self._in_thread(lambda: sequences.prompts_of(self._text, body, self._limits))
        plan = sequences.planned(request, body, prompts, self._limits)
        grammar = None if body.json_schema is None else await self._grammars.compiled(body.json_schema)
        at_once = max(1, self._batch.running // SHARE)
        share = asyncio.Semaphore(at_once)
        self._width.add(min(at_once, len(plan)))
        with sequences.chunks_of(request, body, model) as chunks:
            choices = await sequences.together([self._sequence(share, body, one, grammar, chunks) for one in plan])
            self._finished += 1
            return sequences.answer(request, body, model, prompts, choices, chunks=chunks)

    async def _sequence(
        self, share: asyncio.Semaphore, body: Body, one: Planned, grammar: Grammar | None, chunks: Chunks | None
    ) -> Choice:
        stop_tokens = frozenset(body.stop_token_ids or ())
        async with share, self._slots:
            if self._stopped:  # what is added to a batch that is ending may never be told of its end
                raise Unavailable(STOPPED)
            generated = await self._batch.run(
                one.prompt,
                one.max_new_tokens,
                self._sampling(body, grammar, one.seed),
                self._watch(body, one, stop_tokens, chunks),
                stop_tokens,
            )
        choice = await self._in_thread(lambda: self._choice(generated, body.stops, stop_tokens))
        if chunks is not None:
            chunks.finish(one.index, choice)
        return choice

    def _watch(
        self, body: Body, one: Planned, stop_tokens: Collection[int], chunks: Chunks | None
    ) -> Callable[[list[int]], bool] | None:
        """What is to see a sequence's tokens as they come; whether a stop string came. None: nobody."""
        if chunks is None and not body.stops:
            return None
        deltas = Deltas(self._text, body.stops, stop_tokens)
        if chunks is None:
            return deltas.push

        def push(tokens: list[int]) -> bool:
            met = deltas.push(tokens)
            if not met:
                chunks.more(one.index, deltas.take)
            return met

        return push

    def _choice(self, generated: Generated, stops: Sequence[str], stop_tokens: Collection[int]) -> Choice:
        tokens = generated.tokens
        text = self._text.decode(tokens, stop_tokens)
        before = cut(text, stops)
        ended = before is not None or self._text.ended(tokens, stop_tokens)
        places = None if generated.logprobs is None else self._places(generated, text, before, stop_tokens)
        return Choice(text if before is None else before, "stop" if ended else "length", len(tokens), places)

    def _places(
        self, generated: Generated, text: str, before: str | None, stop_tokens: Collection[int]
    ) -> Sequence[Place]:
        """Not of the token that ended it."""
        tokens = generated.tokens[:-1] if self._text.ended(generated.tokens, stop_tokens) else generated.tokens
        known = [(one.logprob, one.top) for one in generated.logprobs or ()]
        return sequences.places(self._bytes, tokens, known, text, before)

    def _sampling(self, body: Body, grammar: Grammar | None, seed: int) -> Sampling:
        return Sampling(
            temperature=body.temperature,
            top_k=admission.top_k(body, self._limits.vocabulary),
            top_p=body.top_p,
            seed=seed,
            min_p=body.min_p,
            penalties=Penalties(body.repetition_penalty, body.presence_penalty or 0.0, body.frequency_penalty or 0.0),
            logprobs=body.alternatives,
            grammar=grammar,
        )

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._stopped:
            raise Unavailable(STOPPED)
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def wait_gone(self) -> None:
        """Return when the generation thread has ended by itself: what ended it is in the log."""
        while self._stopped or not self._started or self._batch.alive:  # noqa: ASYNC110  # a thread tells nobody
            await asyncio.sleep(WATCH_SECONDS)

    async def stop(self) -> None:
        """End the generation thread; see `Engine.stop`."""
        if self._started and not self._stopped:
            self._stopped = True
            await asyncio.to_thread(self._batch.stop)
            self._grammars.stop()
        self._pool.shutdown(wait=False)  # not cancelling: who waits there would be cancelled with it, and not told
