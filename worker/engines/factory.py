"""Which engine the settings ask for."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from rejoinder.worker.engines.echo import EchoEngine
from rejoinder.worker.engines.host import EngineProcess, HostSettings
from rejoinder.worker.engines.protocol import Engine
from rejoinder.worker.logs import configure
from rejoinder.worker.settings import Settings

PACKAGED_MODEL = "smollm2"
SAME = (
    "cache_memory_share",
    "cuda_graphs",
    "async_batching",
    "compile",
    "warmup",
    "quantization",
    "lora",
    "lora_revision",
    "tokenizer",
    "tokenizer_revision",
    "code_revision",
    "offline",
)
"""Settings of the worker that the engine has too, by the same name and with the same meaning."""
FACTORY = f"{__name__}:create_transformers"


def create_engine(settings: Settings) -> Engine:
    """The engine of the settings, not yet started. Imports no torch: the model's own process does."""
    if settings.engine_name == "echo":
        return EchoEngine(settings.default_path)
    config = transformers_config(settings)
    if not settings.engine_process:
        return create_transformers(config)
    config["logs"] = [settings.log_format, settings.log_level]
    return EngineProcess(
        FACTORY,
        config,
        HostSettings(
            start_seconds=settings.engine_start_seconds,
            hang_seconds=settings.engine_hang_seconds,
            max_deaths=settings.engine_max_deaths,
        ),
    )


def transformers_config(settings: Settings) -> dict[str, Any]:
    """What `create_transformers` takes, as JSON."""
    names = settings.served_model_name
    if not names and settings.model == PACKAGED_MODEL:
        names = [PACKAGED_MODEL]
    return {
        "cache": str(settings.cache),
        "model": settings.model,
        "served_names": names,
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
        "device": settings.device,
        "dtype": settings.dtype,
        "attn": settings.attn,
        "threads": settings.threads,
        "max_model_len": settings.max_model_len,
        "max_running": settings.max_running,
        "max_batch_tokens": settings.max_batch_tokens,
        "cache_bytes": settings.cache_bytes,
        **{name: getattr(settings, name) for name in SAME},
        "default_max_tokens": settings.default_max_tokens,
        "debug": settings.log_level == "debug",
    }


def create_transformers(config: Mapping[str, Any]) -> Engine:
    """Build the transformers engine; called in the engine process.

    Args:
        config: As `transformers_config` made it: the engine's own settings, and `cache`, the directory where the
            packaged model is kept once it is converted. In a process of its own also `logs`, the worker's format and
            level of logs.
    """
    own = dict(config)
    if "logs" in own:
        configure(*own.pop("logs"))
    cache = Path(own.pop("cache"))
    if own["model"] == PACKAGED_MODEL:
        # Only here and below is torch imported.
        own["model"] = str(import_module("rejoinder.worker.engines.smollm2").ensure(cache))
    return cast("Engine", import_module("rejoinder.worker.engines.transformers_engine").create(own))
