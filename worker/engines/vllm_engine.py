"""vLLM as an engine: `/v1/completions` and `/v1/chat/completions` by its `AsyncLLM`. Written against vLLM 0.33.0.

vLLM pins its own torch and transformers, so it lives in an environment of its own (docs/vllm.md). This module imports
it, and only the engine process imports this module. `AsyncLLM` runs the model in processes of its own, always; `guard`
ends them with this one.

Seeds are derived as for the transformers engine, but the noise is vLLM's: the same seed gives other tokens than there.
What vLLM says of reproducibility holds: one version on one kind of GPU repeats itself where its kernels do, and those
depend on what else is in the batch unless `VLLM_BATCH_INVARIANT=1` is set.
"""

# vLLM cannot be installed beside the checkers.
# pyright: reportMissingImports=false

import asyncio
import contextlib
import math
import os
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
from vllm.exceptions import GracefulHTTPError, RetryableRequestError, VLLMClientError, VLLMServerError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from rejoinder.schemas.openai import ChatCompletionRequest, CompletionRequest
from rejoinder.worker.engines import admission, answers, guard
from rejoinder.worker.engines.admission import Limits
from rejoinder.worker.engines.answers import Choice
from rejoinder.worker.engines.protocol import Engine, EngineRequest, EngineStats
from rejoinder.worker.engines.transformers.noise import sequence_seed
from rejoinder.worker.engines.transformers.text import Text
from rejoinder.worker.engines.vllm_settings import VllmSettings
from rejoinder.worker.errors import BadRequest, EngineGone, Failed, Unavailable

AHEAD = 0.25
"""Of the places in the batch, requests admitted beyond them, so that a free place is filled at the next step."""
SHARE = 4
"""One request runs at most one in so many of the places in the batch at once: `n` of 128 must not hold up others."""
EVERY = 16
"""Tokens between two outputs of a sequence: each wakes the event loop, and tells that the engine makes progress."""
SEEDS = 2**63 - 1
"""vLLM keeps a seed in a signed 64-bit integer, and takes -1 for none: ours are the non-negative ones."""
WATCH_SECONDS = 0.25
"""How soon the end of vLLM's processes is noticed where no request was in flight to tell."""

Body = CompletionRequest | ChatCompletionRequest


def create(config: Mapping[str, Any]) -> Engine:
    """The engine for a config of `VllmSettings`. Nothing is loaded yet.

    Raises:
        pydantic.ValidationError: the config breaks a rule.
    """
    return VllmEngine(VllmSettings.model_validate(dict(config)))


class VllmEngine:
    """An `Engine` that hands sequences to vLLM."""

    def __init__(self, settings: VllmSettings) -> None:
        self._settings = settings
        path = Path(settings.model)
        self._served = settings.served_names or [path.resolve().name if path.is_dir() else settings.model]
        self._llm: AsyncLLM | None = None
        self._text: Text | None = None
        self._guard: Any = None
        self._stopped = False
        self._running = 0
        self._steps = 0
        self._calls: set[asyncio.Task[Choice]] = set()

    @property
    def paths(self) -> frozenset[str]:
        """Chat only where the model has a chat template."""
        chat = {"/v1/chat/completions"} if self._text is not None and self._text.has_chat_template else set()
        return frozenset({"/v1/completions"} | chat)

    @property
    def capacity(self) -> int:
        """Sequences in the batch, and a quarter more in vLLM's own queue."""
        if self._llm is None or self._stopped or self._llm.errored:
            return 0
        return self._running + math.ceil(self._running * AHEAD)

    @property
    def progress(self) -> int:
        """Outputs of vLLM: one for each sequence's first token, for every `EVERY` further ones, and for its end."""
        return self._steps

    @property
    def stats(self) -> EngineStats:
        """Zeros: vLLM's steps are its own processes' affair."""
        return EngineStats()

    async def start(self) -> None:
        """Load the model; see `Engine.start`."""
        # As vLLM's own server does: processes that it forks from one with threads can hang.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        # A worker tells nobody what it runs.
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        self._guard = guard.start()
        try:
            llm = await asyncio.to_thread(self._load)
            tasks = await llm.get_supported_tasks()
        except Exception as exc:
            raise EngineGone(f"vLLM cannot run the model {self._settings.model!r}: {_line(exc)}") from exc
        if "generate" not in tasks:
            await asyncio.to_thread(llm.shutdown)
            raise EngineGone(f"the model {self._settings.model!r} does not generate text: vLLM says {tasks}")
        self._llm = llm

    def _load(self) -> AsyncLLM:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._settings.engine_args()))
        self._text = Text(llm.get_tokenizer(), frozenset())
        config = llm.vllm_config
        self._running = config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size
        self._limits = Limits(
            sequence=llm.model_config.max_model_len,
            vocabulary=llm.model_config.get_vocab_size(),
            default_max_tokens=self._settings.default_max_tokens,
        )
        return llm

    async def generate(self, request: EngineRequest) -> Any:
        """Run one request; see `Engine.generate`. The same body again gives the same answer as far as vLLM's does."""
        if self._llm is None or self._text is None or self._stopped:
            raise Unavailable("the engine is not running; the request will be tried again")
        body = admission.parse_body(request.path, request.body)
        model = admission.served_name(body.model, self._served)
        admission.check_sampling(body, self._limits)
        prompts = await self._prompts(self._text, body)
        lengths = [admission.new_tokens(body, len(prompt), self._limits) for prompt in prompts]
        origin = request.response_id if body.seed is None else body.seed
        share = asyncio.Semaphore(max(1, self._running // SHARE))
        sequences = []
        for index in range(len(prompts) * body.n):
            which = index // body.n
            sampling = _sampling(body, self._limits.vocabulary, lengths[which], sequence_seed(origin, index))
            sequences.append(self._sequence(self._llm, share, prompts[which], sampling))
        choices = await self._all(sequences)
        shape = answers.completion if isinstance(body, CompletionRequest) else answers.chat_completion
        return shape(request, model, sum(map(len, prompts)), choices)

    async def _prompts(self, text: Text, body: Body) -> list[list[int]]:
        """The token ids of each prompt, admitted."""
        if isinstance(body, CompletionRequest):
            param = "prompt"
            for prompt in body.prompts:
                if isinstance(prompt, str):
                    admission.check_text(prompt, self._limits, param)
            tokens = [
                await asyncio.to_thread(text.encode, prompt) if isinstance(prompt, str) else prompt
                for prompt in body.prompts
            ]
        else:
            param = "messages"
            admission.check_text("".join(message.text for message in body.messages), self._limits, param)
            tokens = [await asyncio.to_thread(text.encode_chat, body.messages)]
        for ids in tokens:
            admission.check_tokens(ids, self._limits, param)
        return tokens

    async def _sequence(
        self, llm: AsyncLLM, share: asyncio.Semaphore, prompt: list[int], sampling: SamplingParams
    ) -> Choice:
        text, tokens, reason = "", 0, None
        async with share:
            try:
                # A name of its own: a redelivered request can be in flight beside the one it repeats.
                outputs = llm.generate(TokensPrompt(prompt_token_ids=prompt), sampling, uuid.uuid4().hex)
                async with contextlib.aclosing(outputs):
                    async for output in outputs:
                        (part,) = output.outputs
                        text += part.text
                        tokens += len(part.token_ids)
                        reason = part.finish_reason
                        self._steps += 1
            except VLLMClientError as exc:
                raise _refused(exc) from exc
            except (EngineDeadError, GracefulHTTPError, RetryableRequestError) as exc:
                raise Unavailable(f"{_line(exc)}; the request will be tried again") from exc
            except VLLMServerError as exc:
                # Its message may quote the request.
                raise Failed(f"vLLM failed on this request: {type(exc.__cause__ or exc).__name__}") from exc
        if reason not in {"stop", "length"}:
            raise Failed(f"vLLM ended the sequence with {reason!r}")
        return Choice(text, reason, tokens)

    async def _all(self, sequences: Sequence[Coroutine[Any, Any, Choice]]) -> list[Choice]:
        """The results in order. The first failure, or cancelling, ends the others too, and vLLM aborts them."""
        tasks = [asyncio.create_task(sequence) for sequence in sequences]
        self._calls.update(tasks)
        try:
            return await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self._stopped and caller is not None and not caller.cancelling():
                raise Unavailable("the engine was stopped; the request will be tried again") from None
            raise
        finally:
            for task in tasks:
                task.cancel()
            self._calls.difference_update(tasks)

    async def wait_gone(self) -> None:
        """Return when one of vLLM's processes has ended by itself: what ended it is in the log."""
        while self._stopped or self._llm is None or not self._llm.errored:  # noqa: ASYNC110  # a thread tells nobody
            await asyncio.sleep(WATCH_SECONDS)

    async def stop(self) -> None:
        """End vLLM's processes; see `Engine.stop`. Its `shutdown` would leave calls waiting for ever."""
        if self._stopped:
            return
        self._stopped = True
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown)


def _sampling(body: Body, vocabulary: int, max_new_tokens: int, seed: int) -> SamplingParams:
    """One sequence's parameters. What the bodies gain (logprobs, structured outputs) is to be added here.

    Raises:
        BadRequest: vLLM's ranges are narrower than the body's.
    """
    try:
        return _params(body, vocabulary, max_new_tokens, seed)
    except VLLMClientError as exc:
        raise _refused(exc) from exc


def _refused(exc: VLLMClientError) -> BadRequest:
    return BadRequest(f"vLLM refuses the request: {exc}", param=getattr(exc, "parameter", None))


def _params(body: Body, vocabulary: int, max_new_tokens: int, seed: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_new_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=admission.top_k(body, vocabulary),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        seed=seed & SEEDS,
        stop=list(body.stops),
        stop_token_ids=list(body.stop_token_ids or ()),
        output_kind=RequestOutputKind.DELTA,
        stream_interval=EVERY,
        skip_clone=True,  # it is this sequence's alone
    )


def _line(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {' '.join(str(exc).split())[:400]}"
