"""One LoRA adapter, loaded with its model. Safetensors only: a pickle can run anything."""

import json
import warnings
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from rejoinder.worker.errors import EngineGone

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_SHOWN = 3


def apply(model: PreTrainedModel, directory: Path, name: str) -> PreTrainedModel:
    """Add an adapter to a model, which is changed.

    The adapter is merged into the weights: nothing is slower for it. Where that would be wrong (quantized weights
    would lose it in rounding, tied ones would get it twice) it stays beside them, at the cost of two small products
    for each matrix that it is on.

    Args:
        model: On its device.
        directory: With `CONFIG` and `WEIGHTS`.
        name: The adapter's, for errors.

    Returns:
        The model to run.

    Raises:
        EngineGone: it is no LoRA adapter of this model; the message says why.
    """
    kind = _kind(directory, name)
    if kind != "LORA":
        raise EngineGone(f"lora: the adapter {name!r} is {kind or 'of no kind that it names'}, not LORA")
    try:
        from peft import LoraConfig, PeftModel  # noqa: PLC0415  # an extra of its own
    except ImportError as exc:
        raise EngineGone(f"lora needs the package peft ({exc}): pip install 'rejoinder[lora]'") from exc
    # peft and transformers warn of each other's ways. What can be wrong with the adapter is looked for below.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config: Any = LoraConfig.from_pretrained(str(directory))
            config.inference_mode = True
            adapted: Any = PeftModel(model, config)
            result = adapted.load_adapter(str(directory), "default", torch_device=str(model.device))
        except (ValueError, RuntimeError, TypeError, KeyError, OSError) as exc:
            text = " ".join(str(exc).split())[:300]
            raise EngineGone(f"lora: the adapter {name!r} does not fit this model: {text}") from exc
        _complete(result, name)
        if _quantized(model) or _tied(adapted):
            return cast("PreTrainedModel", adapted.get_base_model())
        return cast("PreTrainedModel", adapted.merge_and_unload(safe_merge=True))


def _complete(result: Any, name: str) -> None:
    """See that all weights of the adapter went in: those that lack would be random, those left over without effect."""
    for what, keys in (("lacks", result.missing_keys), ("has, without a place for it,", result.unexpected_keys)):
        if keys:
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            raise EngineGone(
                f"lora: the adapter {name!r} does not fit this model: it {what} {', '.join(keys[:_SHOWN])}{more}"
            )


def check_files(directory: Path, name: str) -> None:
    """See that there is an adapter in a directory.

    Raises:
        EngineGone: there is none, or its weights are pickled.
    """
    if not (directory / CONFIG).is_file():
        raise EngineGone(f"lora: {name!r} is no adapter: it has no {CONFIG}")
    if not (directory / WEIGHTS).is_file():
        found = sorted(file.name for file in directory.glob("adapter_model.*"))
        what = f"only {', '.join(found)}, which is pickled and can run anything" if found else "no weights"
        raise EngineGone(f"lora: the adapter {name!r} has {what}: it must have {WEIGHTS}")


def _kind(directory: Path, name: str) -> str | None:
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise EngineGone(f"lora: the {CONFIG} of {name!r} cannot be read: {exc}") from exc
    kind = config.get("peft_type") if isinstance(config, dict) else None
    return None if kind is None else str(kind)


def _quantized(model: PreTrainedModel) -> bool:
    return getattr(model, "hf_quantizer", None) is not None


def _tied(adapted: Any) -> bool:
    """Whether the adapter is on a matrix that is both the first and the last of the model."""
    text = adapted.get_base_model().config.get_text_config()
    if not getattr(text, "tie_word_embeddings", False):
        return False
    config = adapted.peft_config["default"]
    names = [*adapted.base_model.targeted_module_names, *(config.modules_to_save or ())]
    return any(name.rpartition(".")[2] in {"embed_tokens", "lm_head", "wte"} for name in names)
