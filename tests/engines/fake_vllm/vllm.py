"""A fake of the part of vLLM 0.33.0 that the engine uses, since vLLM needs a GPU and pins a transformers that excludes
ours. Names, arguments, defaults, errors and the order of things are those of vLLM's source. It runs a real model, a
token at a time and without a cache, and its "engine core" is a real process, whose end is the engine's death.

Not faked: batching, vLLM's numerics, its kernels' noise.
"""

import asyncio
import dataclasses
import enum
import subprocess
import sys
import threading
import types
from typing import Any, ClassVar, TypedDict

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

__version__ = "0.33.0"
_EPS = 1e-5


# vllm.exceptions
class VLLMError(Exception): ...


class VLLMClientError(VLLMError): ...


class VLLMServerError(VLLMError): ...


class VLLMValidationError(VLLMClientError):
    def __init__(self, message, *, parameter=None, value=None):
        super().__init__(message)
        self.parameter, self.value = parameter, value


class GenerationError(VLLMServerError): ...


class RetryableRequestError(GenerationError): ...


class GracefulHTTPError(VLLMError): ...


class QueueOverflowError(GracefulHTTPError):
    def __init__(self):
        super().__init__("The engine is currently busy and cannot accept new requests.")


# vllm.v1.engine.exceptions
class EngineGenerateError(VLLMServerError): ...


class EngineDeadError(VLLMServerError):
    def __init__(self):
        super().__init__("EngineCore encountered an issue. See stack trace (above) for the root cause.")


# vllm.sampling_params
class RequestOutputKind(enum.Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclasses.dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None
    skip_clone: bool = False

    def __post_init__(self):
        if self.seed == -1:
            self.seed = None
        if not 0.0 <= self.temperature <= 2.0:
            raise VLLMValidationError(
                f"temperature must be in [0, 2], got {self.temperature}.",
                parameter="temperature",
                value=self.temperature,
            )


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


# vllm.logprobs
@dataclasses.dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# vllm.outputs
@dataclasses.dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: Any
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclasses.dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: Any
    outputs: list[CompletionOutput]
    finished: bool


# vllm.engine.arg_utils
@dataclasses.dataclass
class AsyncEngineArgs:
    model: str = "Qwen/Qwen3-0.6B"
    revision: str | None = None
    tokenizer_revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    load_format: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_queued_reqs: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.92
    disable_log_stats: bool = False
    max_logprobs: int = 20
    speculative_config: dict[str, Any] | None = None
    enable_log_requests: bool = False


# vllm.v1.engine.async_llm
class AsyncLLM:
    args: ClassVar[list[AsyncEngineArgs]] = []

    @classmethod
    def from_engine_args(cls, engine_args):
        cls.args.append(engine_args)
        return cls(engine_args)

    def __init__(self, args):
        self.model = AutoModelForCausalLM.from_pretrained(args.model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        config = self.model.config
        self.eos = self.model.generation_config.eos_token_id
        self.model_config = types.SimpleNamespace(
            max_model_len=args.max_model_len or config.max_position_embeddings,
            get_vocab_size=lambda: config.vocab_size,
            max_logprobs=args.max_logprobs,
        )
        self.vllm_config = types.SimpleNamespace(
            scheduler_config=types.SimpleNamespace(max_num_seqs=args.max_num_seqs or 256),
            parallel_config=types.SimpleNamespace(data_parallel_size=1),
        )
        self.engine_args = args
        self.core = subprocess.Popen(["sleep", "600"])
        self.engine_dead = False
        self.running, self.aborted = {}, []
        threading.Thread(target=self._monitor, daemon=True).start()

    def _monitor(self):
        self.core.wait()
        self.engine_dead = True

    @property
    def errored(self):
        return self.engine_dead

    async def get_supported_tasks(self):
        return ("generate",)

    def get_tokenizer(self):
        return self.tokenizer

    def shutdown(self, timeout=None):
        """As vLLM's: calls that are running wait for ever."""
        self.core.terminate()
        self.core.wait()

    async def abort(self, request_id, internal=False):
        self.aborted.append(request_id)
        self.running.pop(request_id, None)

    def _admit(self, prompt, params):
        if self.errored:
            raise EngineDeadError
        limit = self.engine_args.max_num_queued_reqs
        if limit is not None and len(self.running) + 1 > limit:
            raise QueueOverflowError
        ids = prompt["prompt_token_ids"]
        if not -(2**63) <= (params.seed or 0) < 2**63:
            raise OverflowError("Python int too large to convert to C long")  # numpy's, in the engine core
        if (params.logprobs or 0) > self.model_config.max_logprobs:
            raise VLLMValidationError(
                f"Requested sample logprobs of {params.logprobs}, which is greater than max allowed: "
                f"{self.model_config.max_logprobs}",
                parameter="logprobs",
                value=params.logprobs,
            )
        if self.engine_args.speculative_config is not None and params.min_p > _EPS:
            raise VLLMValidationError(
                "The min_p and logit_bias sampling parameters are not yet supported with speculative decoding."
            )
        if len(ids) >= self.model_config.max_model_len:
            raise VLLMValidationError("The decoder prompt is longer than the maximum model length")
        return ids

    async def generate(self, prompt, sampling_params, request_id, *, prompt_text=None, priority=0):
        assert sampling_params.output_kind is RequestOutputKind.DELTA
        added = False
        try:
            ids = self._admit(prompt, sampling_params)
            assert request_id not in self.running
            self.running[request_id], added = sampling_params, True
            sent = text_sent = 0
            interval = sampling_params.stream_interval or 1
            sequence = _Sequence(self, ids, sampling_params)
            while sequence.finish_reason is None:
                await asyncio.to_thread(sequence.step)
                if self.engine_dead:
                    raise EngineDeadError
                finished = sequence.finish_reason is not None
                if finished or sent == 0 or len(sequence.tokens) - sent >= interval:
                    text = sequence.text(finished)
                    known = None if sampling_params.logprobs is None else sequence.logprobs[sent:]
                    part = CompletionOutput(0, text[text_sent:], sequence.tokens[sent:], None, known)
                    part.finish_reason, part.stop_reason = sequence.finish_reason, sequence.stop_reason
                    sent, text_sent = len(sequence.tokens), max(text_sent, len(text))
                    if finished:
                        self.running.pop(request_id)
                    yield RequestOutput(request_id, None, ids, None, [part], finished)
        except (asyncio.CancelledError, GeneratorExit):
            if added and request_id in self.running:
                await self.abort(request_id, internal=True)
            raise
        except (EngineDeadError, VLLMClientError, GracefulHTTPError, GenerationError):
            raise
        except Exception as exc:
            raise EngineGenerateError from exc


class _Sequence:
    def __init__(self, llm, ids, params):
        self.llm, self.ids, self.params = llm, list(ids), params
        self.tokens, self.logprobs = [], []
        self.finish_reason = self.stop_reason = None
        self.noise = torch.Generator()
        if params.seed is not None:
            self.noise.manual_seed(params.seed)

    @torch.inference_mode()
    def step(self):
        params = self.params
        logits = self.llm.model(torch.tensor([self.ids + self.tokens])).logits[0, -1].float()
        raw = logits.log_softmax(-1)  # logprobs_mode raw_logprobs, the default
        counts = torch.bincount(torch.tensor(self.tokens, dtype=torch.long), minlength=len(logits))
        seen = torch.bincount(torch.tensor(self.ids), minlength=len(logits)) + counts > 0
        factor = torch.where(seen, params.repetition_penalty, 1.0)
        logits = torch.where(logits > 0, logits / factor, logits * factor)
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
        if params.temperature < _EPS:
            token = int(logits.argmax())
        else:
            weights = (logits / params.temperature).softmax(-1)
            weights[weights < params.min_p * weights.max()] = 0
            if params.top_k > 0:
                weights[weights < weights.topk(params.top_k).values[-1]] = 0
            weights, order = (weights / weights.sum()).sort(descending=True)
            weights[weights.cumsum(-1) - weights > params.top_p] = 0
            token = int(order[torch.multinomial(weights, 1, generator=self.noise)])
        self.tokens.append(token)
        if params.logprobs is not None:
            # The drawn one first; one that is among the likeliest too stays there with its rank among them.
            known = {token: Logprob(float(raw[token]), int((raw >= raw[token]).sum()))}
            for rank, other in enumerate(raw.topk(params.logprobs).indices.tolist(), 1):
                known[other] = Logprob(float(raw[other]), rank)
            self.logprobs.append(known)
        if token in self.llm.eos or token in params.stop_token_ids:
            self.finish_reason = "stop"
            self.stop_reason = None if token in self.llm.eos else token
        elif found := [stop for stop in params.stop if stop in self._decoded()]:
            self.finish_reason, self.stop_reason = "stop", found[0]
        elif (
            len(self.tokens) >= params.max_tokens
            or len(self.ids) + len(self.tokens) >= self.llm.model_config.max_model_len
        ):
            self.finish_reason = "length"

    def _decoded(self):
        tokens = self.tokens
        if self.finish_reason == "stop" and not isinstance(self.stop_reason, str):
            tokens = tokens[:-1]
        return self.llm.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def text(self, finished):
        """The text so far: what could be the beginning of a stop string, or half a character, is held back."""
        text = self._decoded()
        if isinstance(self.stop_reason, str):
            return text[: text.find(self.stop_reason)]
        if finished:
            return text
        whole = text.rstrip("\ufffd")
        return whole[: max(0, len(whole) - max((len(stop) - 1 for stop in self.params.stop), default=0))]


def _tree():
    here = sys.modules[__name__]
    names = {
        "exceptions": [
            GenerationError, GracefulHTTPError, QueueOverflowError, RetryableRequestError, VLLMClientError, VLLMError,
            VLLMServerError, VLLMValidationError,
        ],
        "sampling_params": [RequestOutputKind, SamplingParams],
        "v1": [],
        "v1.engine": [],
        "v1.engine.async_llm": [AsyncLLM],
        "v1.engine.exceptions": [EngineDeadError, EngineGenerateError],
    }  # fmt: skip
    here.__path__ = []
    for name, members in names.items():
        module = types.ModuleType(f"vllm.{name}")
        module.__path__ = []
        vars(module).update({member.__name__: member for member in members})
        sys.modules[f"vllm.{name}"] = module


_tree()
