"""What a model is for, and so which engine runs it."""

from collections.abc import Mapping
from typing import Any, Literal

from rejoinder.worker.engines.protocol import Engine
from rejoinder.worker.engines.transformers import embeddings, engine, rerank
from rejoinder.worker.engines.transformers.loading import quiet
from rejoinder.worker.engines.transformers.settings import TransformersSettings, out_of_place
from rejoinder.worker.engines.transformers.sources import checkpoint_json, refuse_pickles
from rejoinder.worker.errors import EngineGone

Task = Literal["generate", "embed", "rerank"]


def create(config: Mapping[str, Any]) -> Engine:
    """The engine for a config of `TransformersSettings`. No weights are loaded yet.

    Raises:
        pydantic.ValidationError: the config breaks a rule.
        EngineGone: the model's task is left to its config, which cannot be read, or a setting is of another task.
    """
    settings = TransformersSettings.model_validate(dict(config))
    task = task_of(settings)
    if why := out_of_place(settings, task):
        raise EngineGone(f"{settings.model!r} is a model for task {task}: {why}")
    match task:
        case "embed":
            return embeddings.create(config)
        case "rerank":
            return rerank.create(config)
        case "generate":
            return engine.create(config)


def task_of(settings: TransformersSettings) -> Task:
    """The task that the settings name, or the one that the checkpoint's files say.

    Raises:
        EngineGone: it is left to the checkpoint, whose files cannot be read.
    """
    if settings.task != "auto":
        return settings.task
    if not settings.debug:
        quiet()
    refuse_pickles(settings.model)
    architectures = (checkpoint_json(settings, "config.json") or {}).get("architectures") or [""]
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return "rerank"
    # Before the architecture: an embedding model made of a decoder often keeps the decoder's.
    if checkpoint_json(settings, "modules.json") is not None:
        return "embed"
    return "embed" if all(_cannot_generate(name) for name in architectures) else "generate"


def _cannot_generate(architecture: str) -> bool:
    """Whether it is a model without a head that says the next token. Older ones are called GPT2LMHeadModel."""
    return architecture.endswith(("Model", "ForMaskedLM")) and not architecture.endswith("LMHeadModel")
