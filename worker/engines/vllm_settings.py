"""What can be set of the vLLM engine. No vLLM: the worker reads it too."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

OWN = {
    "model": "model",
    "served_model_name": "served_model_name",
    "revision": "revision",
    "tokenizer_revision": "revision",
    "trust_remote_code": "trust_remote_code",
    "dtype": "dtype",
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_running",
    "max_num_batched_tokens": "max_batch_tokens",
    "kv_cache_memory_bytes": "cache_bytes",
}
"""Arguments of vLLM that have a setting of the worker: its name. They are not set twice."""


class VllmSettings(BaseModel):
    """The config of `rejoinder.worker.engines.vllm_engine:create`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(min_length=1, description="A directory, or the name of a repository on the hub.")
    revision: str | None = Field(default=None, description="Of the repository: a branch, a tag or a commit.")
    served_names: list[str] = Field(
        default=[],
        description="Names that a request may give as model; the first is the default. Empty: the model's own.",
    )
    trust_remote_code: bool = Field(default=False, description="Run the Python code that the repository contains.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: as vLLM has it."
    )
    max_model_len: int | None = Field(
        default=None, ge=2, description="Prompt and new tokens of one sequence. Absent: the model's context."
    )
    max_running: int | None = Field(default=None, ge=1, description="Sequences at once. Absent: vLLM's own number.")
    max_batch_tokens: int | None = Field(default=None, ge=1, description="Tokens in one step. Absent: vLLM's own.")
    cache_bytes: int | None = Field(default=None, ge=1, description="Of the KV cache. Absent: what the GPU has left.")
    default_max_tokens: int = Field(
        default=256, ge=1, description="New tokens of a chat completion whose body does not say."
    )
    vllm_args: dict[str, Any] = Field(default={}, description="Further fields of vLLM's AsyncEngineArgs.")
    debug: bool = Field(default=False, description="Of the engine process: whether its log may quote requests.")

    @field_validator("vllm_args")
    @classmethod
    def _set_once(cls, value: dict[str, Any]) -> dict[str, Any]:
        return not_twice(value)

    def engine_args(self) -> dict[str, Any]:
        """The keyword arguments of `AsyncEngineArgs`."""
        given = {
            "model": self.model,
            "revision": self.revision,
            "tokenizer_revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_running,
            "max_num_batched_tokens": self.max_batch_tokens,
            "kv_cache_memory_bytes": self.cache_bytes,
            # vLLM's own default falls back to pickled weights, which run what they like.
            "load_format": "safetensors",
            "disable_log_stats": True,
            **self.vllm_args,
        }
        return {name: value for name, value in given.items() if value is not None}


def not_twice(args: dict[str, Any]) -> dict[str, Any]:
    """`vllm_args` as they are, where none of them has a setting of the worker.

    Raises:
        ValueError: one has; the message names the setting.
    """
    for name in args:
        if name in OWN:
            raise ValueError(f"vllm_args has {name!r}, which is the worker's setting {OWN[name]}: set that")
    return args
