"""What can be set of the transformers engine. No torch: the worker reads it too."""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Attention = Literal["auto", "varlen", "flash", "sdpa", "eager"]
Compile = Literal["none", "default", "max", "max-static"]


def needs_gpu(settings: Any) -> str | None:
    """What of these settings, the worker's or the engine's own, a CPU cannot do, if anything."""
    if settings.attn == "flash":
        return "attn is flash, which runs on a GPU only: leave attn at auto"
    if settings.cache_memory_share is not None:
        return "cache_memory_share is of a GPU's memory: on the CPU set cache_bytes"
    for name in ("cuda_graphs", "async_batching"):
        if getattr(settings, name):
            return f"{name} needs a GPU: leave it off"
    return None


_CONTINUOUS = ("cuda_graphs", "async_batching", "compile")
_GENERATING = ("batching", "cache_bytes", "cache_memory_share", *_CONTINUOUS, "default_max_tokens")
_EMBEDDING = ("pooling", "normalize")


def out_of_place(settings: Any, task: str) -> str | None:
    """What of these settings, the worker's or the engine's own, a model for `task` would not heed, if anything."""
    if task != "generate" and (name := _changed(settings, _GENERATING)):
        return f"{name} has no meaning for task {task}, which generates nothing: leave it out"
    if task != "embed" and (name := _changed(settings, _EMBEDDING)):
        return f"{name} has no meaning for task {task}, which makes no embeddings: leave it out"
    return None


def not_static(settings: Any) -> str | None:
    """What of these settings static batching would not heed, if anything."""
    name = _changed(settings, _CONTINUOUS)
    return f"{name} is set, which only continuous batching has: leave it out" if name else None


def _changed(settings: Any, names: Sequence[str]) -> str | None:
    """The first of some settings that is not at its default."""
    fields = type(settings).model_fields
    return next((name for name in names if getattr(settings, name) != fields[name].default), None)


def contradiction(settings: Any) -> str | None:  # noqa: PLR0911  # one for each rule
    """What of these settings, the worker's or the engine's own, cannot be together, if anything."""
    if settings.device == "cpu" and (why := needs_gpu(settings)):
        return f"device is cpu, but {why}"
    if settings.cache_bytes is not None and settings.cache_memory_share is not None:
        return "cache_bytes and cache_memory_share both say how large the KV cache is: leave one out"
    if settings.lora_revision is not None and settings.lora is None:
        return "lora_revision has no meaning without lora"
    if settings.code_revision is not None and not settings.trust_remote_code:
        return "code_revision has no meaning without trust_remote_code"
    methods = ("quant_method", "load_in_8bit", "load_in_4bit")
    if settings.quantization is not None and not any(settings.quantization.get(key) for key in methods):
        return 'quantization does not say how: it needs quant_method, as in {"quant_method": "torchao", ...}'
    if settings.batching == "static" and (why := not_static(settings)):
        return f"batching is static, but {why}"
    return None if settings.task == "auto" else out_of_place(settings, settings.task)


class TransformersSettings(BaseModel):
    """The config of `rejoinder.worker.engines.transformers.tasks:create`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(min_length=1, description="A directory, or the name of a repository on the hub.")
    revision: str | None = Field(default=None, description="Of the repository: a branch, a tag or a commit.")
    tokenizer: str | None = Field(
        default=None, min_length=1, description="Where the tokenizer is, if elsewhere: as model."
    )
    tokenizer_revision: str | None = Field(
        default=None, description="Of the tokenizer. Absent: the model's, where the tokenizer is the model's own."
    )
    lora: str | None = Field(
        default=None, min_length=1, description="A LoRA adapter, as model. It is merged into the weights."
    )
    lora_revision: str | None = Field(default=None, description="Of the adapter's repository.")
    offline: bool = Field(default=False, description="Fetch nothing: what is not here already is an error.")
    served_names: list[str] = Field(
        default=[],
        description="Names that a request may give as model; the first is the default. Empty: the model's own.",
    )
    task: Literal["auto", "generate", "embed", "rerank"] = Field(
        default="auto", description="What the model is for. auto: what its config says."
    )
    pooling: Literal["auto", "mean", "cls", "last"] = Field(
        default="auto",
        description="Which tokens make an embedding. auto: as the checkpoint says, else mean for an encoder and last"
        " for a decoder.",
    )
    normalize: bool | None = Field(
        default=None, description="Scale embeddings to length 1. Absent: as the checkpoint says, else yes."
    )
    trust_remote_code: bool = Field(default=False, description="Run the Python code that the repository contains.")
    code_revision: str | None = Field(
        default=None, description="Of that code, where it is in a repository of its own. Absent: its main branch."
    )
    device: str = Field(default="auto", description="cpu, cuda, cuda:1, ...; auto: the GPU where there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: float32 on a CPU, where bfloat16 is slower; else the checkpoint's."
    )
    quantization: dict[str, Any] | None = Field(
        default=None, description="A quantization config of transformers, by its quant_method."
    )
    attn: Attention = Field(
        default="auto", description="How attention is computed. auto: varlen on a CPU, else the model's own choice."
    )
    batching: Literal["auto", "continuous", "static"] = Field(
        default="auto", description="auto: continuous, and static for the models that it cannot serve."
    )
    threads: int | None = Field(default=None, ge=1, description="Of torch on a CPU. Absent: torch's own choice.")
    max_model_len: int | None = Field(
        default=None, ge=2, description="Prompt and new tokens of one sequence. Absent: the model's context."
    )
    max_running: int | None = Field(
        default=None,
        ge=1,
        description="Sequences at once. Absent: 32 on a CPU, else 256. Of embed and rerank: requests; absent: 256.",
    )
    max_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens in one step. Absent: 256 on a CPU, else what the memory allows. Of embed and rerank: with"
        " padding, in one forward; absent: 512 on a CPU, else 16384.",
    )
    cache_bytes: int | None = Field(
        default=None, ge=1, description="Of the KV cache. Absent: 1 GiB on a CPU, else what the memory allows."
    )
    cache_memory_share: float | None = Field(
        default=None, gt=0, le=1, description="Of the GPU memory that is free once the model is loaded, for the cache."
    )
    page_size: int | None = Field(
        default=None, ge=4, description="Tokens in a page of the KV cache. Absent: 32 on a CPU, else transformers' own."
    )
    prefix_sharing: bool = Field(
        default=True, description="Compute what prompts begin with in common once, while the KV cache has room for it."
    )
    cuda_graphs: bool = Field(default=False, description="Replay steps as CUDA graphs.")
    async_batching: bool = Field(
        default=False, description="Prepare a step on the CPU while the GPU does the one before it."
    )
    compile: Compile = Field(default="none", description="Compile the steps: default, max or max-static.")
    warmup: bool = Field(default=True, description="Generate a little before requests are taken.")
    default_max_tokens: int = Field(
        default=256, ge=1, description="New tokens of a chat completion whose body does not say."
    )
    stall_seconds: float = Field(
        default=90.0, gt=0, description="A sequence that gets no further for this long while others do is ended."
    )
    debug: bool = Field(default=False, description="Let transformers log and warn as it likes.")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if problem := contradiction(self):
            raise ValueError(problem)
        return self
