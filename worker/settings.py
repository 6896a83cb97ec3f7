"""Every setting of the worker: its default, what it is for, and where its value came from.

A flag beats `REJOINDER_<NAME>`, which beats `rejoinder.toml`, which beats the default. Only this module reads the
environment.
"""

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator

from rejoinder.schemas.problems import said
from rejoinder.worker.engine_rules import engine_problem
from rejoinder.worker.engines.transformers.settings import Attention, Compile
from rejoinder.worker.store_settings import store_problem

ENV_PREFIX = "REJOINDER_"
CONFIG_FILE = "rejoinder.toml"
SECRETS = frozenset({"token"})
"""Settings whose values nobody prints."""


class SettingsError(ValueError):
    """A setting has no usable value; the message names it, its origin, and what is allowed."""


def _comma_list(value: Any) -> Any:
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


def _json_object(value: Any) -> Any:
    """A JSON object from a flag or the environment: as text, or `@FILE`. From a TOML file it is a table already."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(Path(value[1:]).read_text(encoding="utf-8") if value.startswith("@") else value)
    except (OSError, ValueError) as exc:  # JSON and UTF-8 errors are ValueErrors
        raise ValueError(f"it should be a JSON object, or @ and the name of a file with one: {exc}") from exc


Names = Annotated[list[str], BeforeValidator(_comma_list)]
JsonObject = Annotated[dict[str, Any], BeforeValidator(_json_object)]


class Settings(BaseModel):
    """The worker's settings. Times are seconds, sizes bytes, lengths tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests: str = Field(description="URL of the queue or subscription to pull requests from.")
    responses: str = Field(description="URL of the queue or topic to publish responses to.")
    engine: Literal["auto", "transformers", "vllm", "functions", "echo"] = Field(
        default="auto", description="auto: transformers where a model is named, functions where an app is."
    )
    model: str | None = Field(default=None, description="smollm2, a local directory, or a hub name.")
    served_model_name: Names = Field(
        default=[], description="Names that requests may ask for, comma-separated. Default: the model's own."
    )
    task: Literal["auto", "generate", "embed", "rerank"] = Field(
        default="auto", description="What the model is for. auto: what its config says."
    )
    pooling: Literal["auto", "mean", "cls", "last"] = Field(
        default="auto",
        description="Which tokens make an embedding. auto: the checkpoint's, else mean (encoder) or last (decoder).",
    )
    normalize: bool | None = Field(
        default=None, description="Scale embeddings to length 1. Default: as the checkpoint says, else yes."
    )
    app: str | None = Field(
        default=None,
        description="Your own functions: MODULE or MODULE:NAME, found in app_dir or installed.",
    )
    app_dir: Path = Field(default=Path(), description="Where the app's module is looked for first.")
    app_params: JsonObject = Field(
        default={}, description="The deployment's custom object, for the app's init or service: JSON, or @FILE."
    )
    app_concurrency: int = Field(
        default=8,
        ge=1,
        description="Calls of the app's generate and generate_stream at once, in each process.",
    )
    app_cancel_seconds: float = Field(
        default=5.0,
        gt=0,
        description="A call that goes on for this long after its request timed out or was cancelled: its process ends.",
    )
    max_batch_size: int = Field(default=32, ge=1, description="Requests in one call of the app's generate_batch.")
    max_batch_bytes: int = Field(default=16 << 20, ge=1, description="Of their bodies as JSON, in one such call.")
    max_wait_ms: float = Field(
        default=5.0, ge=0, le=60_000, description="How long such a call waits for further requests, in milliseconds."
    )
    token: SecretStr | None = Field(
        default=None, min_length=1, description="The app's context.get_token(). Best given as REJOINDER_TOKEN."
    )
    token_file: Path | None = Field(
        default=None, description="A file with that token in it, read again when it changes."
    )
    default_path: str = Field(
        default="/v1/completions", pattern=r"^/\S*$", description="The path of a request that has none."
    )

    max_attempts: int = Field(
        default=5, ge=1, description="Deliveries of a request before its retryable error is answered."
    )
    retry_delay_seconds: float = Field(
        default=1.0, gt=0, le=3600, description="Delay after the first failed attempt; doubles with each."
    )
    retry_delay_max_seconds: float = Field(default=300.0, gt=0, le=36000, description="The longest such delay.")
    invocation_timeout_seconds: float = Field(
        default=900.0, gt=0, le=3600, description="Limit of one inference where the request sets none; then 504."
    )
    max_hold_seconds: float = Field(
        default=42_000.0,
        gt=0,
        description="A request held longer than this since its receipt is answered 504. Below the 12 h of SQS.",
    )
    max_request_bytes: int = Field(default=10_000_000, ge=1, description="A larger request is answered 413.")
    prefetch: int | None = Field(
        default=None, ge=0, description="Requests held beyond the engine's slots. Default: what one receive takes."
    )
    grace_seconds: float = Field(
        default=30.0, ge=0, description="After SIGTERM, how long running requests may take to finish."
    )

    stream_interval_ms: float = Field(
        default=100.0,
        ge=0,
        le=60_000,
        description="The pause between a stream's messages: what comes meanwhile is in the next, in milliseconds.",
    )
    stream_max_bytes: int = Field(
        default=64 << 10, ge=1, description="So much of a stream does not wait for the pause to end."
    )
    cancels: str | None = Field(
        default=None,
        description="URL of the store of cancel marks. Default: beside sqlite:// requests, else cancels/ in blobs.",
    )

    blobs: str | None = Field(
        default=None, description="URL of a store for large results: s3://, gs:// or file://, with a prefix."
    )
    output_path: str | None = Field(default=None, description="Where results are stored. Default: outputs/ in blobs.")
    failure_path: str | None = Field(
        default=None, description="Where answered failures are stored. Default: failures/ in blobs."
    )
    max_inline_bytes: int | None = Field(
        default=None,
        ge=0,
        description="A larger response has its result stored. Default, and bound: what the response topic carries.",
    )
    ledger: str | None = Field(
        default=None, description="URL of a store that keeps each response, so that no request is run twice."
    )
    allow_input: Names = Field(
        default=[],
        description="URL prefixes that inputs may be read from, repeatable or comma-separated. Always: blobs.",
    )
    max_input_bytes: int = Field(
        default=64 << 20, ge=1, description="A larger input that is one document is answered 413."
    )
    s3_event_path: str | None = Field(
        default=None, pattern=r"^/\S*$", description="The path of requests made of S3 event notifications."
    )
    s3_event_metadata: JsonObject = Field(
        default={"bucket": "{bucket}", "key": "{key}"},
        description="Their metadata: JSON, or @FILE. Also size, etag, version_id, sequencer, event_name, event_time.",
    )
    extended_client: bool = Field(
        default=False, description="Too large responses go to blobs, and to SQS as the Extended Client's pointers."
    )
    success_topic: str | None = Field(default=None, description="URL of a topic for SageMaker's notices of success.")
    error_topic: str | None = Field(default=None, description="The same for notices of failure and of expiry.")
    include_inference_response: bool = Field(
        default=False, description="Such notices have the response in them, where it is not above 128 KB."
    )
    endpoint_name: str = Field(
        default="rejoinder",
        pattern=r"^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}$",
        description="The name of the endpoint in such notices.",
    )

    engine_process: bool = Field(default=True, description="Run the model in a process of its own.")
    engine_processes: int = Field(
        default=1, ge=1, description="Copies of the model on the device, each in a process of its own."
    )
    engine_start_seconds: float = Field(default=900.0, gt=0, description="Limit of loading the model.")
    engine_hang_seconds: float = Field(
        default=120.0, gt=0, description="An engine that makes no progress for this long is killed and restarted."
    )
    engine_stall_seconds: float = Field(
        default=90.0,
        gt=0,
        description="A sequence that gets no further for this long while the engine runs others is ended with 503.",
    )
    engine_max_deaths: int = Field(
        default=5, ge=1, description="Deaths of the engine without a finished request between, before the worker ends."
    )

    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    devices: Names = Field(
        default=[], description="Such as cuda:0,cuda:1: one engine process on each, in place of device."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: float32 on the CPU, else the checkpoint's own."
    )
    attn: Attention = Field(
        default="auto", description="How attention is computed. auto: varlen on the CPU, else the model's own choice."
    )
    batching: Literal["auto", "continuous", "static"] = Field(
        default="auto", description="How requests share the model. auto: continuous, static where a model needs it."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    trust_remote_code: bool = Field(default=False, description="Run code that comes with the checkpoint.")
    max_model_len: int | None = Field(default=None, ge=2, description="Prompt plus new tokens. Default: the model's.")
    max_running: int | None = Field(default=None, ge=1, description="Requests in the batch at once. Default: auto.")
    max_batch_tokens: int | None = Field(default=None, ge=1, description="Tokens in one step. Default: auto.")
    cache_bytes: int | None = Field(default=None, ge=1, description="Size of the KV cache. Default: auto.")
    cache_memory_share: float | None = Field(
        default=None, gt=0, le=1, description="In place of cache_bytes: of the GPU memory free after loading, up to 1."
    )
    cuda_graphs: bool = Field(default=False, description="On a GPU: replay steps as CUDA graphs.")
    async_batching: bool = Field(default=False, description="On a GPU: prepare a step while the one before it runs.")
    compile: Compile = Field(
        default="none", description="Compile the model's steps. Each level starts slower and runs faster."
    )
    warmup: bool = Field(default=True, description="Generate a little before the first request is taken.")
    quantization: JsonObject | None = Field(
        default=None, description="Quantization config of transformers: JSON, or @FILE with it. It has a quant_method."
    )
    lora: str | None = Field(
        default=None, min_length=1, description="LoRA adapter, merged into the model: a directory or a hub name."
    )
    lora_revision: str | None = Field(default=None, description="Branch, tag or commit of a hub adapter.")
    tokenizer: str | None = Field(
        default=None, min_length=1, description="Directory or hub name of the tokenizer. Default: the model's."
    )
    tokenizer_revision: str | None = Field(default=None, description="Branch, tag or commit of a hub tokenizer.")
    code_revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of trust_remote_code's code, where that is elsewhere.",
    )
    offline: bool = Field(default=False, description="Fetch nothing from the hub: only what is on this machine.")
    default_max_tokens: int = Field(
        default=256, ge=1, description="New tokens of a chat completion that sets no limit (a text completion: 16)."
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of each model. Default: torch's own; of several processes, its share of the cores.",
    )
    vllm_args: JsonObject = Field(
        default={}, description="Further fields of vLLM's AsyncEngineArgs: a JSON object, or a table in the file."
    )
    cache_dir: Path | None = Field(default=None, description="Where converted models are kept. Default: the user's.")

    log_format: Literal["auto", "console", "json"] = Field(
        default="auto", description="auto: console on a terminal, else JSON."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="debug logs every request, by its ids."
    )

    @model_validator(mode="after")
    def _fit_together(self) -> "Settings":
        if problem := engine_problem(self) or store_problem(self):
            raise ValueError(problem)
        return self

    @property
    def engine_name(self) -> Literal["transformers", "vllm", "functions", "echo"]:
        """The engine that runs."""
        if self.engine == "auto":
            return "transformers" if self.app is None else "functions"
        return self.engine

    @property
    def cache(self) -> Path:
        """Where converted models are kept."""
        return self.cache_dir or user_cache_dir()


@dataclass(frozen=True, slots=True)
class Resolved:
    """The settings, and for each where its value came from."""

    settings: Settings
    origins: Mapping[str, str]


def user_cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The user's cache directory for this program, as the XDG base directory specification names it."""
    base = environ.get("XDG_CACHE_HOME", "")
    # The specification: a relative path is invalid and to be ignored.
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "rejoinder"


def gather(
    flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ, config: Path | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The raw value of each setting that somebody set, and where: deciding only, nothing is validated.

    Args:
        flags: Settings from the command line; None: not given.
        environ: The environment; names outside the settings are ignored, since others may use the prefix.
        config: A TOML file that must exist. Default: `rejoinder.toml` in the working directory, if it is there.

    Raises:
        SettingsError: the file cannot be read, is no TOML, or names a setting that does not exist.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    path = config or Path(CONFIG_FILE)
    for name, value in _read_toml(path, required=config is not None).items():
        if name not in Settings.model_fields:
            raise SettingsError(f"unknown setting {name!r} in {path}; known are {', '.join(Settings.model_fields)}")
        values[name], origins[name] = value, str(path)
    for name in Settings.model_fields:
        variable = ENV_PREFIX + name.upper()
        if environ.get(variable):
            values[name], origins[name] = environ[variable], variable
        if flags.get(name) is not None:
            values[name], origins[name] = flags[name], "flag"
    return values, origins


def _read_toml(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise SettingsError(f"the settings file {path} does not exist") from None
        return {}
    except (OSError, ValueError) as exc:  # TOML and UTF-8 errors are ValueErrors
        raise SettingsError(f"the settings file {path} cannot be read: {exc}") from exc


def resolve(flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ, config: Path | None = None) -> Resolved:
    """Gather and validate the settings.

    Raises:
        SettingsError: a value is missing or not allowed; names it and its origin.
    """
    values, origins = gather(flags, environ, config)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as exc:
        raise SettingsError("; ".join(_problem(error, origins) for error in exc.errors(include_url=False))) from exc
    return Resolved(settings, {name: origins.get(name, "default") for name in Settings.model_fields})


def _problem(error: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    message = said(error)
    if not error["loc"]:
        return message
    name = str(error["loc"][0])
    if error["type"] == "missing":
        return f"{name} is missing: give --{name.replace('_', '-')} or {ENV_PREFIX}{name.upper()}"
    value = "**********" if name in SECRETS else repr(error["input"])
    return f"{name} (from {origins.get(name, 'default')}) is {value}: {message}"
