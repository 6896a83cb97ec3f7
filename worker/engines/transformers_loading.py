"""From a model's name to its weights, tokenizer and limits. Safetensors only: a pickle can run anything."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from rejoinder.worker.engines.transformers_settings import TransformersSettings
from rejoinder.worker.errors import EngineGone

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run, and what is known of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int
    """Prompt and new tokens together, at most, by the model's own config."""
    vocabulary: int
    """Token ids are below this."""
    eos: frozenset[int]
    """Each of these tokens ends a sequence."""


def load(settings: TransformersSettings) -> LoadedModel:
    """Load model and tokenizer onto the device.

    Raises:
        EngineGone: it cannot be loaded; the message says in one line what to do.
    """
    model, tokenizer = load_as(AutoModelForCausalLM, settings)
    config = model.config.get_text_config()
    context = context_of(settings, getattr(config, "max_position_embeddings", None))
    return LoadedModel(model, tokenizer, context, config.vocab_size, _eos(model, tokenizer))


def load_as(kind: Any, settings: TransformersSettings, **options: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a model by one of transformers' auto classes, onto the device, and its tokenizer.

    Args:
        kind: Such as `AutoModel`.
        settings: Which model, and where to.
        options: For its `from_pretrained`.

    Raises:
        EngineGone: it cannot be loaded; the message says in one line what to do.
    """
    if not settings.debug:
        quiet()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = _device(settings.device)
    source: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code, "revision": settings.revision}
    refuse_pickles(settings.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model, **source)
        model = kind.from_pretrained(
            settings.model, dtype=_dtype(settings.dtype, device), use_safetensors=True, **source, **options
        )
    except (OSError, ValueError, ImportError) as exc:
        raise EngineGone(f"the model {settings.model!r} cannot be loaded: {_advice(exc)}") from exc
    if model.config.is_encoder_decoder:
        raise EngineGone(f"the model {settings.model!r} is an encoder-decoder, which this engine does not serve")
    return model.to(device).eval(), tokenizer


def checkpoint_json(settings: TransformersSettings, name: str) -> Any:
    """The JSON value of one of the checkpoint's files, such as `config.json`; None where there is no such file.

    Raises:
        EngineGone: it cannot be told whether there is one, or it is no JSON.
    """
    try:
        # Without the flag a missing file and a hub that is away are one error, and a guess would be made of both.
        path = cached_file(
            settings.model, name, revision=settings.revision, _raise_exceptions_for_missing_entries=False
        )
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise EngineGone(f"{name} of the model {settings.model!r} cannot be read: {_advice(exc)}") from exc


def quiet() -> None:
    """Leave transformers' progress bars and warnings out of the log: it warns of what this package guards."""
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as exc:
        first = str(exc).partition("\n")[0]
        raise EngineGone(f"the device {name!r} cannot be used: {first}") from exc


def _dtype(name: str, device: torch.device) -> Any:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, name)


def context_of(settings: TransformersSettings, positions: int | None) -> int:
    """The longest sequence in tokens: the setting's, else the model's `positions`.

    Raises:
        EngineGone: neither says, or the setting is longer than the model's.
    """
    if settings.max_model_len is None:
        if positions is None:
            raise EngineGone(
                f"the config of {settings.model!r} does not say how long its context is: set max_model_len"
            )
        return positions
    if positions is not None and settings.max_model_len > positions:
        # One token past the model's positions is an index error that ends every request in its batch.
        raise EngineGone(
            f"max_model_len is {settings.max_model_len}, but the model {settings.model!r} knows {positions} positions"
            f" (max_position_embeddings): set at most {positions}"
        )
    return settings.max_model_len


def refuse_pickles(model: str) -> None:
    """Say it plainly for a directory; for the hub, transformers says that there is no safetensors file."""
    path = Path(model)
    if not path.is_dir():
        if path.is_absolute() or model.startswith((".", "~")) or path.is_file():
            raise EngineGone(f"the model {model!r} is no directory: give one, or the name of a hub repository")
        return
    if not any(path.glob("*.safetensors")):
        found = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        what = f"only {', '.join(found)}, which is pickled and can run anything" if found else "no weights"
        raise EngineGone(
            f"the model {model!r} has {what}: weights must be .safetensors"
            " (save_pretrained writes them, wherever the model can be loaded)"
        )


def _advice(exc: Exception) -> str:
    first = " ".join(str(exc).split())[:400]
    return f"{first} (give a directory, or a hub repository that can be reached from here)"


def _eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    config: Any = model.generation_config.eos_token_id if model.generation_config else None
    if config is None:
        config = model.config.get_text_config().eos_token_id
    ids = config if isinstance(config, list) else [config]
    return frozenset(token for token in [*ids, tokenizer.eos_token_id] if isinstance(token, int) and token >= 0)
