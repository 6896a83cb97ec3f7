"""From a model's name to its weights, tokenizer and limits. Safetensors only: a pickle can run anything."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from structlog import get_logger
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import is_accelerate_available

from rejoinder.worker.engines.transformers import lora
from rejoinder.worker.engines.transformers.attention import in_force
from rejoinder.worker.engines.transformers.quantization import method, quantization_config
from rejoinder.worker.engines.transformers.settings import TransformersSettings, needs_gpu
from rejoinder.worker.engines.transformers.sources import advice, lora_directory, pinned, refuse_pickles
from rejoinder.worker.errors import EngineGone

LENGTH_WITHOUT_POSITIONS = 4096
"""Where nobody says how long a sequence may be and the model itself has no limit: `max_model_len` sets another."""

log = get_logger(__name__)


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
    commits: Mapping[str, str] = field(default_factory=dict)
    """Of what came from the hub: which commit, by the setting that named it."""


def load(settings: TransformersSettings) -> LoadedModel:
    """Load a generating model, its tokenizer and adapter onto the device.

    Raises:
        EngineGone: it cannot be loaded; the message says in one line what to do.
    """
    commits: dict[str, str] = {}
    model, tokenizer = load_as(_generating, settings, commits)
    config = model.config.get_text_config()
    if settings.tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise EngineGone(
            f"the tokenizer {settings.tokenizer!r} is not this model's: it has {len(tokenizer)} tokens, the model"
            f" {config.vocab_size}"
        )
    context = context_of(settings, getattr(config, "max_position_embeddings", None), _usual(model, tokenizer))
    return LoadedModel(model, tokenizer, context, config.vocab_size, _eos(model, tokenizer), commits)


def tell(settings: TransformersSettings, model: Any, commits: Mapping[str, str]) -> None:
    """Log what was loaded, once it is as it will run."""
    where = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    named = {f"{what}_commit": commit for what, commit in commits.items()}
    log.info("model_loaded", model=settings.model, **where, attn=in_force(model), **named)


def _generating(config: Any) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_as(
    kind: Callable[[Any], Any], settings: TransformersSettings, commits: dict[str, str], **options: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a model by one of transformers' auto classes, onto the device, its adapter and its tokenizer.

    Args:
        kind: From the model's config to such as `AutoModel`.
        settings: Which model, and where to.
        commits: Gets the commit of each artefact that comes from the hub, by the setting that names it.
        options: For its `from_pretrained`.

    Raises:
        EngineGone: it cannot be loaded; the message says in one line what to do.
    """
    device = _prepared(settings)
    code: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if settings.code_revision is not None:
        code["code_revision"] = settings.code_revision
    source = code | pinned("model", settings.model, settings.revision, settings.offline, commits)
    own = settings.tokenizer is None  # then it is where the model is
    revision = settings.tokenizer_revision or (settings.revision if own else None)
    text_name = settings.tokenizer or settings.model
    text_source = code | pinned("tokenizer", text_name, revision, settings.offline, commits)
    refuse_pickles(settings.model)
    adapter = None if settings.lora is None else lora_directory(settings.lora, settings, commits)
    if settings.quantization is not None:
        options["quantization_config"] = quantization_config(settings.quantization)
    try:
        tokenizer = AutoTokenizer.from_pretrained(text_name, **text_source)
        config = AutoConfig.from_pretrained(settings.model, **source)
        quantized = settings.quantization is not None or getattr(config, "quantization_config", None) is not None
        if is_accelerate_available() and quantized:
            options["device_map"] = {"": device}  # some methods quantize on the GPU only, and cannot be moved there
        # Not config=config: what from_pretrained makes of its own it also fits to dtype and quantization.
        model = kind(config).from_pretrained(
            settings.model, dtype=_dtype(settings.dtype, device), use_safetensors=True, **options, **source
        )
        if model.device != device:
            model = model.to(device)
    except (OSError, ValueError, ImportError, RuntimeError, TypeError, KeyError, AttributeError) as exc:
        raise EngineGone(f"the model {settings.model!r} cannot be loaded{_with(settings)}: {advice(exc)}") from exc
    if adapter is not None and settings.lora is not None:
        model = lora.apply(model, adapter, settings.lora)
    return model.eval(), tokenizer


def _prepared(settings: TransformersSettings) -> torch.device:
    """The device, and the process set up for loading onto it."""
    if not settings.debug:
        quiet()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = _device(settings.device)
    if device.type == "cpu" and (why := needs_gpu(settings)):
        raise EngineGone(f"there is no GPU to use here, but {why}")
    return device


def _with(settings: TransformersSettings) -> str:
    return "" if settings.quantization is None else f" with quantization {method(settings.quantization)}"


def quiet() -> None:
    """Leave transformers' progress bars and warnings out of the log: it warns of what this package guards."""
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            # transformers measures free memory, and quantizes, on the device that is current.
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as exc:
        first = str(exc).partition("\n")[0]
        raise EngineGone(f"the device {name!r} cannot be used: {first}") from exc
    return device


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


def context_of(settings: TransformersSettings, positions: int | None, usual: int | None = None) -> int:
    """The longest sequence in tokens: the setting's, else the model's `positions`, else what is `usual`.

    Raises:
        EngineGone: nobody says, or the setting is longer than the model's.
    """
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


def _eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    config: Any = model.generation_config.eos_token_id if model.generation_config else None
    if config is None:
        config = model.config.get_text_config().eos_token_id
    ids = config if isinstance(config, list) else [config]
    return frozenset(token for token in [*ids, tokenizer.eos_token_id] if isinstance(token, int) and token >= 0)
