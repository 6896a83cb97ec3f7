"""The engine for models that generate text: `/v1/completions` and `/v1/chat/completions`."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from rejoinder.schemas.openai import ChatCompletionRequest, CompletionRequest
from rejoinder.worker.engines import admission, answers
from rejoinder.worker.engines.admission import Limits
from rejoinder.worker.engines.answers import Choice
from rejoinder.worker.engines.protocol import Engine, EngineRequest
from rejoinder.worker.engines.transformers_batch import Batch
from rejoinder.worker.engines.transformers_choice import choose_batch
from rejoinder.worker.engines.transformers_loading import load
from rejoinder.worker.engines.transformers_noise import sequence_seed
from rejoinder.worker.engines.transformers_penalties import Penalties
from rejoinder.worker.engines.transformers_sampling import Sampling
from rejoinder.worker.engines.transformers_settings import TransformersSettings
from rejoinder.worker.engines.transformers_text import StopMatcher, Text, cut
from rejoinder.worker.errors import Unavailable

TEXT_THREADS = 2
"""Tokenization and detokenization at once: enough to stay ahead of a model, few enough to leave it the processor."""
SHARE = 4
"""One request runs at most one in so many of the places in the batch at once: `n` of 128 must not hold up requests of
one sequence each, whose own time limits run meanwhile."""
WATCH_SECONDS = 0.25
"""How soon the end of the generation thread is noticed where no request was in flight to tell."""

T = TypeVar("T")
Body = CompletionRequest | ChatCompletionRequest


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
        self._admitted = 0
        self._finished = 0

    @property
    def paths(self) -> frozenset[str]:
        """Chat only where the model has a chat template."""
        chat = {"/v1/chat/completions"} if self._started and self._text.has_chat_template else set()
        return frozenset({"/v1/completions"} | chat)

    @property
    def capacity(self) -> int:
        """Sequences in the batch, and those that wait at its door: a place that is free at the next step is filled."""
        return self._admitted if self._started and not self._stopped and self._batch.alive else 0

    @property
    def progress(self) -> int:
        """Steps of the model and requests done."""
        return self._finished + (self._batch.steps if self._started else 0)

    async def start(self) -> None:
        """Load the model; see `Engine.start`."""
        await asyncio.to_thread(self._load)
        self._admitted = self._batch.running + self._batch.ahead
        self._slots = asyncio.Semaphore(self._admitted)
        self._batch.start()
        self._started = True

    def _load(self) -> None:
        loaded = load(self._settings)
        self._text = Text(loaded.tokenizer, loaded.eos)
        self._batch: Batch = choose_batch(loaded, self._settings)
        self._limits = Limits(
            sequence=min(loaded.context, self._batch.longest),
            vocabulary=loaded.vocabulary,
            default_max_tokens=self._settings.default_max_tokens,
            penalties=self._batch.penalties,
            separate=loaded.model.config.is_encoder_decoder,
        )

    async def generate(self, request: EngineRequest) -> Any:
        """Run one request; see `Engine.generate`."""
        if not self._started or self._stopped:
            raise Unavailable("the engine is not running; the request will be tried again")
        body = admission.parse_body(request.path, request.body)
        model = admission.served_name(body.model, self._served)
        admission.check_sampling(body, self._limits)
        prompts = await self._prompts(body)
        lengths = [admission.new_tokens(body, len(prompt), self._limits) for prompt in prompts]
        origin = request.response_id if body.seed is None else body.seed
        share = asyncio.Semaphore(max(1, self._batch.running // SHARE))
        sequences = [
            self._sequence(share, body, prompts[i // body.n], lengths[i // body.n], sequence_seed(origin, i))
            for i in range(len(prompts) * body.n)
        ]
        choices = await _all(sequences)
        self._finished += 1
        shape = answers.completion if isinstance(body, CompletionRequest) else answers.chat_completion
        return shape(request, model, sum(map(len, prompts)), choices)

    async def _prompts(self, body: Body) -> list[list[int]]:
        """The token ids of each prompt, admitted."""
        if isinstance(body, CompletionRequest):
            for prompt in body.prompts:
                if isinstance(prompt, str):
                    admission.check_text(prompt, self._limits, "prompt")
            tokens = await self._in_thread(lambda: [_tokens(self._text, prompt) for prompt in body.prompts])
        else:
            admission.check_text("".join(message.text for message in body.messages), self._limits, "messages")
            tokens = [await self._in_thread(lambda: self._text.encode_chat(body.messages))]
        for ids in tokens:
            admission.check_tokens(ids, self._limits, "prompt" if isinstance(body, CompletionRequest) else "messages")
        return tokens

    async def _sequence(
        self, share: asyncio.Semaphore, body: Body, prompt: Sequence[int], max_new_tokens: int, seed: int
    ) -> Choice:
        sampling = _sampling(body, self._limits.vocabulary, seed)
        stop_tokens = frozenset(body.stop_token_ids or ())
        matcher = StopMatcher(self._text, body.stops) if body.stops else None
        async with share, self._slots:
            generated = await self._batch.run(
                prompt, max_new_tokens, sampling, matcher.push if matcher else None, stop_tokens
            )
        tokens = generated.tokens
        text = await self._in_thread(lambda: self._text.decode(tokens, stop_tokens))
        before = cut(text, body.stops)
        ended = before is not None or self._text.ended(tokens, stop_tokens)
        return Choice(text if before is None else before, "stop" if ended else "length", len(tokens))

    async def _in_thread(self, work: Callable[[], T]) -> T:
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
        self._pool.shutdown(wait=False, cancel_futures=True)


def _sampling(body: Body, vocabulary: int, seed: int) -> Sampling:
    return Sampling(
        temperature=body.temperature,
        top_k=admission.top_k(body, vocabulary),
        top_p=body.top_p,
        seed=seed,
        min_p=body.min_p,
        penalties=Penalties(body.repetition_penalty, body.presence_penalty or 0.0, body.frequency_penalty or 0.0),
    )


def _tokens(text: Text, prompt: str | list[int]) -> list[int]:
    return text.encode(prompt) if isinstance(prompt, str) else prompt


async def _all(sequences: Sequence[Coroutine[Any, Any, Choice]]) -> list[Choice]:
    """The results in order. The first failure, or cancelling, ends the others too."""
    tasks = [asyncio.create_task(sequence) for sequence in sequences]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
