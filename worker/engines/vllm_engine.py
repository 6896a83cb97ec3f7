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
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
from vllm.exceptions import GracefulHTTPError, RetryableRequestError, VLLMClientError, VLLMServerError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from rejoinder.worker.engines import admission, guard, sequences
from rejoinder.worker.engines.admission import Limits
from rejoinder.worker.engines.answers import Choice
from rejoinder.worker.engines.chunks import Chunks
from rejoinder.worker.engines.protocol import Engine, EngineRequest, EngineStats
from rejoinder.worker.engines.sequences import SHARE, Body, Planned
from rejoinder.worker.engines.token_bytes import TokenBytes
from rejoinder.worker.engines.transformers.text import Text
from rejoinder.worker.engines.vllm_settings import VllmSettings
from rejoinder.worker.errors import BadRequest, EngineGone, Failed, Unavailable

AHEAD = 0.25
"""Of the places in the batch, requests admitted beyond them, so that a free place is filled at the next step."""
EVERY = 16
"""Tokens between two outputs of a sequence: each wakes the event loop, and tells that the engine makes progress. One of
a stream has each of them."""
SEEDS = 2**63 - 1
"""vLLM keeps a seed in a signed 64-bit integer, and takes -1 for none: ours are the non-negative ones."""
STOPPED = "the engine was stopped"
WATCH_SECONDS = 0.25
"""How soon the end of vLLM's processes is noticed where no request was in flight to tell."""


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
        self._calls: set[asyncio.Task[Any]] = set()

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
        """Outputs of vLLM: for each sequence's first token, every `EVERY` further ones (of a stream each), its end."""
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
        self._bytes = TokenBytes(llm.get_tokenizer())
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
        llm, text = self._llm, self._text
        if llm is None or text is None or self._stopped:
            raise Unavailable("the engine is not running")
        body = admission.parse_body(request.path, request.body)
        model = admission.served_name(body.model, self._served)
        admission.check_sampling(body, self._limits)
        if body.json_schema is not None:
            # vLLM compiles a schema without limits in the processes that run everybody's requests.
            raise BadRequest(
                "response_format is not supported by engine vllm: leave it out or ask for text", param="response_format"
            )
        prompts = await asyncio.to_thread(sequences.prompts_of, text, body, self._limits)
        share = asyncio.Semaphore(max(1, self._running // SHARE))
        plan = sequences.planned(request, body, prompts, self._limits)
        every = EVERY if request.emit is None else 1
        asked = [(one, _sampling(body, self._limits.vocabulary, one, every)) for one in plan]
        with sequences.chunks_of(request, body, model) as chunks:
            calls = [self._sequence(llm, text, share, one, how, chunks=chunks) for one, how in asked]
            choices = await sequences.together(calls)
            return sequences.answer(request, body, model, prompts, choices, chunks=chunks)

    async def _sequence(
        self,
        llm: AsyncLLM,
        text: Text,
        share: asyncio.Semaphore,
        one: Planned,
        sampling: SamplingParams,
        *,
        chunks: Chunks | None,
    ) -> Choice:
        said, tokens, known = "", list[int](), list[Mapping[int, Any]]()
        part: Any = None
        async with share, self._call():
            # A name of its own: a redelivered request can be in flight beside the one it repeats.
            outputs = llm.generate(TokensPrompt(prompt_token_ids=one.prompt), sampling, uuid.uuid4().hex)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    (part,) = output.outputs
                    said += part.text
                    tokens += part.token_ids
                    known += part.logprobs or () if part.token_ids else ()
                    self._steps += 1
                    if chunks is not None and part.text:
                        chunks.text(one.index, part.text)
        reason = part and part.finish_reason
        if reason not in {"stop", "length"}:
            raise Failed(f"vLLM ended the sequence with {reason!r}")
        places = None
        if sampling.logprobs is not None:
            # Stopped by a token, which is not told, or by a string, which cuts the text.
            by_string = isinstance(part.stop_reason, str)
            shown = tokens[:-1] if reason == "stop" and not by_string else tokens
            top = [_logprobs(entries, token, sampling.logprobs) for entries, token in zip(known, tokens, strict=True)]
            places = await asyncio.to_thread(
                lambda: sequences.places(self._bytes, shown, top, text.decode(shown), said if by_string else None)
            )
        choice = Choice(said, reason, len(tokens), places)
        if chunks is not None:
            chunks.finish(one.index, choice)
        return choice

    @contextlib.asynccontextmanager
    async def _call(self) -> AsyncIterator[None]:
        """Around a call of vLLM: `stop` ends it, and its errors become the worker's."""
        task = asyncio.current_task()
        if self._stopped or task is None:
            raise Unavailable(STOPPED)
        self._calls.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if self._stopped:
                raise Unavailable(STOPPED) from None
            raise
        except VLLMClientError as exc:
            raise _refused(exc) from exc
        except (EngineDeadError, GracefulHTTPError, RetryableRequestError) as exc:
            raise Unavailable(f"{_line(exc)}") from exc
        except VLLMServerError as exc:
            # Its message may quote the request.
            raise Failed(f"vLLM failed on this request: {type(exc.__cause__ or exc).__name__}") from exc
        finally:
            self._calls.discard(task)

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


def _sampling(body: Body, vocabulary: int, one: Planned, every: int) -> SamplingParams:
    """One sequence's parameters.

    Raises:
        BadRequest: vLLM's ranges are narrower than the body's.
    """
    try:
        return _params(body, vocabulary, one, every)
    except VLLMClientError as exc:
        raise _refused(exc) from exc


def _refused(exc: VLLMClientError) -> BadRequest:
    return BadRequest(f"vLLM refuses the request: {exc}", param=getattr(exc, "parameter", None))


def _params(body: Body, vocabulary: int, one: Planned, every: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=one.max_new_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=admission.top_k(body, vocabulary),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        seed=one.seed & SEEDS,
        stop=list(body.stops),
        stop_token_ids=list(body.stop_token_ids or ()),
        logprobs=body.alternatives,
        output_kind=RequestOutputKind.DELTA,
        stream_interval=every,
        skip_clone=True,  # it is this sequence's alone
    )


def _logprobs(entries: Mapping[int, Any], drawn: int, alternatives: int) -> tuple[float, list[tuple[int, float]]]:
    """Of one place, out of vLLM's: those of the likeliest tokens, and of the drawn one where it is none of them."""
    others = len(entries) > alternatives
    top = [(token, entry.logprob) for token, entry in entries.items() if not (others and token == drawn)]
    return entries[drawn].logprob, sorted(top, key=lambda known: -known[1])


def _line(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {' '.join(str(exc).split())[:400]}"
