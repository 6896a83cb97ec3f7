"""From a model's name to its weights, tokenizer and limits. Safetensors only: a pickle can run anything."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rejoinder.worker.engines.transformers_settings import TransformersSettings
from rejoinder.worker.errors import EngineGone

LENGTH_WITHOUT_POSITIONS = 4096
"""Where nobody says how long a sequence may be and the model itself has no limit: `max_model_len` sets another."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run, and what is known of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int
    """Prompt and new tokens together, at most, by the model's own config; of an encoder-decoder each of the two."""
    vocabulary: int
    """Token ids are below this."""
    eos: frozenset[int]
    """Each of these tokens ends a sequence."""


def load(settings: TransformersSettings) -> LoadedModel:
    """Load model and tokenizer onto the device.

    Raises:
        EngineGone: it cannot be loaded; the message says in one line what to do.
    """
    if not settings.debug:
        quiet()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = _device(settings.device)
    source: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code, "revision": settings.revision}
    _refuse_pickles(settings.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model, **source)
        config = AutoConfig.from_pretrained(settings.model, **source)
        auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_pretrained(
            settings.model, dtype=_dtype(settings.dtype, device), use_safetensors=True, **source
        )
    except (OSError, ValueError, ImportError) as exc:
        raise EngineGone(f"the model {settings.model!r} cannot be loaded: {_advice(exc)}") from exc
    model = model.to(device).eval()
    text = model.config.get_text_config()
    context = _context(settings, getattr(text, "max_position_embeddings", None), _usual(model, tokenizer))
    return LoadedModel(model, tokenizer, context, text.vocab_size, _eos(model, tokenizer))


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


def _usual(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How long sequences are of a model that knows no positions: T5's are relative, a state has none."""
    if not model.config.is_encoder_decoder and not model._is_stateful:
        return None
    trained = getattr(model.config, "n_positions", None)  # of T5's older configs
    return trained or min(tokenizer.model_max_length, LENGTH_WITHOUT_POSITIONS)


def _context(settings: TransformersSettings, positions: int | None, usual: int | None) -> int:
    if settings.max_model_len is None:
        positions = positions or usual
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


def _refuse_pickles(model: str) -> None:
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
