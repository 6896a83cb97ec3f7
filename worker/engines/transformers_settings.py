"""What can be set of the transformers engine. No torch: the worker reads it too."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TransformersSettings(BaseModel):
    """The config of `rejoinder.worker.engines.transformers_engine:create`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(min_length=1, description="A directory, or the name of a repository on the hub.")
    revision: str | None = Field(default=None, description="Of the repository: a branch, a tag or a commit.")
    served_names: list[str] = Field(
        default=[],
        description="Names that a request may give as model; the first is the default. Empty: the model's own.",
    )
    trust_remote_code: bool = Field(default=False, description="Run the Python code that the repository contains.")
    device: str = Field(default="auto", description="cpu, cuda, cuda:1, ...; auto: the GPU where there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: float32 on a CPU, where bfloat16 is slower; else the checkpoint's."
    )
    attn: Literal["auto", "varlen", "sdpa", "eager"] = Field(
        default="auto", description="How attention is computed. auto: varlen on a CPU, else the model's own choice."
    )
    batching: Literal["auto", "continuous", "static"] = Field(
        default="auto", description="auto: continuous, and static for the models that it cannot serve."
    )
    threads: int | None = Field(default=None, ge=1, description="Of torch on a CPU. Absent: torch's own choice.")
    max_model_len: int | None = Field(
        default=None, ge=2, description="Prompt and new tokens of one sequence. Absent: the model's context."
    )
    max_running: int | None = Field(default=None, ge=1, description="Sequences at once. Absent: 32 on a CPU, else 256.")
    max_batch_tokens: int | None = Field(
        default=None, ge=1, description="Tokens in one step. Absent: 256 on a CPU, else what the memory allows."
    )
    cache_bytes: int | None = Field(
        default=None, ge=1, description="Of the KV cache. Absent: 1 GiB on a CPU, else what the memory allows."
    )
    page_size: int | None = Field(
        default=None, ge=4, description="Tokens in a page of the KV cache. Absent: 32 on a CPU, else transformers' own."
    )
    cuda_graphs: bool = Field(default=False, description="Replay steps as CUDA graphs: needs flash attention.")
    default_max_tokens: int = Field(
        default=256, ge=1, description="New tokens of a chat completion whose body does not say."
    )
    debug: bool = Field(default=False, description="Let transformers log and warn as it likes.")
