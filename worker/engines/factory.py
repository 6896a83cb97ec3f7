"""Which engine the settings ask for."""

import logging
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from rejoinder.worker.engines.child import VISIBLE_DEVICE
from rejoinder.worker.engines.echo import EchoEngine
from rejoinder.worker.engines.host import EngineProcess, HostSettings
from rejoinder.worker.engines.pool import EnginePool
from rejoinder.worker.engines.protocol import Engine
from rejoinder.worker.engines.quarantine import Suspects
from rejoinder.worker.errors import EngineGone
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
VLLM_FACTORY = f"{__name__}:create_vllm"
FUNCTIONS_FACTORY = f"{__name__}:create_functions"


def create_engine(settings: Settings) -> Engine:
    """The engine of the settings, not yet started. Imports no torch: the model's own process does."""
    if settings.engine_name == "echo":
        return EchoEngine(settings.default_path)
    if settings.engine_name == "vllm":
        config, create, factory = vllm_config(settings), create_vllm, VLLM_FACTORY
    elif settings.engine_name == "functions":
        config, create, factory = functions_config(settings), create_functions, FUNCTIONS_FACTORY
    else:
        config, create, factory = transformers_config(settings), create_transformers, FACTORY
    if not settings.engine_process:
        return create(config)
    config["logs"] = [settings.log_format, settings.log_level]
    functions = settings.engine_name == "functions"
    host = HostSettings(
        start_seconds=settings.engine_start_seconds,
        hang_seconds=settings.engine_hang_seconds,
        max_deaths=settings.engine_max_deaths,
        cancel_seconds=settings.app_cancel_seconds if functions else None,
    )
    if settings.engine_name == "vllm":
        return EngineProcess(factory, config, host)
    devices = settings.devices or [settings.device] * settings.engine_processes
    on = _alone_with if functions else _on
    if len(devices) == 1:
        return EngineProcess(factory, {**config, **on(devices[0])}, host)
    if settings.threads is None:
        # Each would take as many as there are cores, and they would run in each other's way. A GPU needs few.
        config["threads"] = max(1, _cores() // len(devices))
    suspects = Suspects()
    names = settings.devices or [f"{device}, process {number}" for number, device in enumerate(devices, 1)]
    processes = [
        EngineProcess(factory, {**config, **on(device)}, host, suspects, name)
        for device, name in zip(devices, names, strict=True)
    ]
    return EnginePool(processes, suspects)


def _on(device: str) -> dict[str, Any]:
    return {"device": device}


def _alone_with(device: str) -> dict[str, Any]:
    """For code that takes `cuda` to be its own: the process sees one GPU, and a call that goes on can be told."""
    number = device.removeprefix("cuda:")
    one = {"device": "cuda", VISIBLE_DEVICE: int(number)} if device != number and number.isdecimal() else _on(device)
    return {**one, "linger": True}


def _cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        "task": settings.task,
        "pooling": settings.pooling,
        "normalize": settings.normalize,
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
        **{name: getattr(settings, name) for name in SAME},
        "default_max_tokens": settings.default_max_tokens,
        "stall_seconds": settings.engine_stall_seconds,
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
    return cast("Engine", import_module("rejoinder.worker.engines.transformers.tasks").create(own))


def vllm_config(settings: Settings) -> dict[str, Any]:
    """What `create_vllm` takes, as JSON: the engine's own settings."""
    return {
        "model": settings.model,
        "served_names": settings.served_model_name,
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_running": settings.max_running,
        "max_batch_tokens": settings.max_batch_tokens,
        "cache_bytes": settings.cache_bytes,
        "default_max_tokens": settings.default_max_tokens,
        "vllm_args": settings.vllm_args,
        "debug": settings.log_level == "debug",
    }


def create_vllm(config: Mapping[str, Any]) -> Engine:
    """Build the vLLM engine; called in the engine process.

    Raises:
        EngineGone: vLLM is not installed here, or the model is the demo's.
    """
    own = dict(config)
    if "logs" in own:
        configure(*own.pop("logs"))
    if own["model"] == PACKAGED_MODEL:
        raise EngineGone(f"{PACKAGED_MODEL} is packaged for engine transformers: give vLLM a directory or a hub name")
    try:
        module = import_module("rejoinder.worker.engines.vllm_engine")
    except ModuleNotFoundError as exc:
        if exc.name != "vllm":
            raise
        raise EngineGone(
            "vLLM is not installed: it needs an environment of its own, made with pip install 'rejoinder[vllm]'"
            " (it pins torch and transformers, and rejoinder[transformers] needs others)"
        ) from exc
    return cast("Engine", module.create(own))


def functions_config(settings: Settings) -> dict[str, Any]:
    """What `create_functions` takes, as JSON: the engine's own settings."""
    return {
        "app": settings.app,
        "app_dir": str(settings.app_dir.absolute()),
        "params": settings.app_params,
        "concurrency": settings.app_concurrency,
        "max_batch_size": settings.max_batch_size,
        "max_batch_bytes": settings.max_batch_bytes,
        "max_wait_ms": settings.max_wait_ms,
        "default_path": settings.default_path,
        "device": settings.device,
        "token": settings.token and settings.token.get_secret_value(),
        "token_file": settings.token_file and str(settings.token_file.absolute()),
        "log_level": settings.log_level,
        "debug": settings.log_level == "debug",
    }


def create_functions(config: Mapping[str, Any]) -> Engine:
    """Build the engine of the user's own functions; called in the engine process. The app is imported at its start."""
    own = dict(config)
    if "logs" in own:
        configure(*own.pop("logs"))
    if (level := own.pop("log_level", None)) is not None:
        # The app is no library: what its own loggers say at the worker's level is to be seen.
        logging.getLogger(own["app"].partition(":")[0].partition(".")[0]).setLevel(level.upper())
    if (threads := own.pop("threads", None)) is not None:
        # One of several processes: most libraries of numbers would else take all cores in each.
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    return cast("Engine", import_module("rejoinder.worker.engines.functions.engine").create(own))
