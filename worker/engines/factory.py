"""Which engine the settings ask for."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from rejoinder.worker.engines.echo import EchoEngine
from rejoinder.worker.engines.host import EngineProcess, HostSettings
from rejoinder.worker.engines.protocol import Engine
from rejoinder.worker.settings import Settings

PACKAGED_MODEL = "smollm2"
FACTORY = f"{__name__}:create_transformers"


def create_engine(settings: Settings) -> Engine:
    """The engine of the settings, not yet started. Imports no torch: the model's own process does."""
    if settings.engine_name == "echo":
        return EchoEngine(settings.default_path)
    config = transformers_config(settings)
    if not settings.engine_process:
        return create_transformers(config)
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
        "batching": settings.batching,
        "threads": settings.threads,
        "max_model_len": settings.max_model_len,
        "max_running": settings.max_running,
        "max_batch_tokens": settings.max_batch_tokens,
        "cache_bytes": settings.cache_bytes,
        "default_max_tokens": settings.default_max_tokens,
        "debug": settings.log_level == "debug",
    }


def create_transformers(config: Mapping[str, Any]) -> Engine:
    """Build the transformers engine; called in the engine process.

    Args:
        config: As `transformers_config` made it: the engine's own settings, and `cache`, the directory where the
            packaged model is kept once it is converted.
    """
    own = dict(config)
    cache = Path(own.pop("cache"))
    if own["model"] == PACKAGED_MODEL:
        # Only here and below is torch imported.
        own["model"] = str(import_module("rejoinder.worker.engines.smollm2").ensure(cache))
    return cast("Engine", import_module("rejoinder.worker.engines.transformers_engine").create(own))
