"""What settings of engines need of each other: one that would be ignored is refused."""

from typing import Any

from rejoinder.worker.engines.transformers.settings import contradiction
from rejoinder.worker.engines.vllm_settings import not_twice

OF_PROCESSES = ("devices", "engine_processes", "engine_start_seconds", "engine_hang_seconds", "engine_max_deaths")
"""Settings of the processes that models run in."""
NOT_OF_VLLM = (
    *("task", "pooling", "normalize", "engine_processes", "engine_stall_seconds", "device", "devices", "attn"),
    *("batching", "cache_memory_share", "cuda_graphs", "async_batching", "compile", "warmup", "quantization"),
    *("lora", "lora_revision", "tokenizer", "tokenizer_revision", "code_revision", "offline", "threads"),
)
"""What vLLM has its own ways for, or has not at all."""
_OF_MODELS = (
    *("served_model_name", "dtype", "revision", "trust_remote_code", "cache_dir", "max_model_len", "max_running"),
    *("max_batch_tokens", "cache_bytes", "default_max_tokens"),
)
NOT_OF_ECHO = (
    *(name for name in _OF_MODELS if name != "cache_dir"),
    *("engine_process", *OF_PROCESSES),
    *(name for name in NOT_OF_VLLM if name not in OF_PROCESSES),
)
NOT_OF_FUNCTIONS = (
    *_OF_MODELS,
    *(name for name in NOT_OF_VLLM if name not in {*OF_PROCESSES, "device"}),
)
"""What the app does as it likes: `app_params` is for that."""
OF_FUNCTIONS = (
    *("app", "app_dir", "app_params", "app_concurrency", "app_cancel_seconds"),
    *("max_batch_size", "max_batch_bytes", "max_wait_ms", "token", "token_file"),
)


def engine_problem(settings: Any) -> str | None:
    """What of engines cannot be in the worker's `Settings`, in one line; None: all can."""
    return _without_its_model(settings) or contradiction(settings) or _out_of_place(settings) or _processes(settings)


def _without_its_model(settings: Any) -> str | None:
    name, model, app = settings.engine_name, settings.model, settings.app
    if model is not None and app is not None:
        return "model and app exclude each other: an app loads its own model"
    if name == "functions":
        return (
            "app is missing: name the module of your functions, such as my_package.my_module" if app is None else None
        )
    if name != "echo" and model is None:
        return "model is missing: name smollm2, a local directory or a hub model (or an app, or take engine echo)"
    if name == "echo" and model is not None:
        return "model has no meaning with engine echo: leave one of them out"
    return None


def _out_of_place(settings: Any) -> str | None:
    name = settings.engine_name
    if settings.vllm_args:
        if name != "vllm":
            return "vllm_args has a meaning only with engine vllm: leave it out"
        try:
            not_twice(settings.vllm_args)
        except ValueError as exc:
            return str(exc)
    if settings.token is not None and settings.token_file is not None:
        return "token and token_file exclude each other: the one is the token, the other is where it is"
    reasons = {
        "vllm": (NOT_OF_VLLM, "with engine vllm: leave it out, or use vLLM's own in vllm_args"),
        "echo": (NOT_OF_ECHO, "with engine echo, which has no model: leave it out"),
        "functions": (NOT_OF_FUNCTIONS, "with an app, which loads its own model: leave it out, or use app_params"),
    }
    if name in reasons and (problem := _asked(settings, *reasons[name])):
        return problem
    return None if name == "functions" else _asked(settings, OF_FUNCTIONS, "without engine functions: leave it out")


def _asked(settings: Any, names: tuple[str, ...], why: str) -> str | None:
    """What somebody set of some settings, which would be ignored."""
    asked = ", ".join(name for name in names if name in settings.model_fields_set)
    return f"{asked} has no meaning {why}" if asked else None


def _processes(settings: Any) -> str | None:
    if not settings.engine_process and (
        problem := _asked(settings, OF_PROCESSES, "without engine_process: leave it out")
    ):
        return problem
    if "devices" not in settings.model_fields_set:
        return None
    for name in ("device", "engine_processes"):
        if name in settings.model_fields_set:
            return f"devices and {name} exclude each other: devices has one process on each"
    return _no_devices(settings.devices)


def _no_devices(devices: list[str]) -> str | None:
    """Why it is no list of different devices."""
    if not devices:
        return "devices is empty: name at least one, such as cuda:0,cuda:1"
    if "auto" in devices:
        return "devices names each device itself, such as cuda:0,cuda:1: auto is none"
    same = ["cuda:0" if device == "cuda" else device for device in devices]
    twice = sorted({device for device in same if same.count(device) > 1})
    if twice:
        return f"devices names {', '.join(twice)} twice: for copies on one device take engine_processes"
    return None
