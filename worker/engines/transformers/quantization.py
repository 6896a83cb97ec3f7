"""Quantization configs, as transformers reads them: which keys there are is for each method to say."""

import inspect
from collections.abc import Mapping
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

from rejoinder.worker.errors import EngineGone

_EVERYWHERE = frozenset({"quant_method", "load_in_8bit", "load_in_4bit", "quant_config"})


def quantization_config(given: Mapping[str, Any]) -> Any:
    """The config object for `from_pretrained`.

    Args:
        given: As it would stand in a checkpoint's config.json, `quant_method` included.

    Raises:
        EngineGone: there is no such method, its package is missing, or a key or value is wrong.
    """
    name = method(given)
    if name not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
        raise EngineGone(f"quantization: there is no quant_method {name!r}; transformers has {known}")
    kind: Any = AUTO_QUANTIZATION_CONFIG_MAPPING[name]
    # Most of them drop what they do not know: a key with a letter wrong would be no error, only another model.
    keys = {key for key in inspect.signature(kind.__init__).parameters if key not in {"self", "kwargs"}}
    if unknown := sorted(set(given) - keys - _EVERYWHERE):
        raise EngineGone(f"quantization: {name} has no {', '.join(unknown)}; it has {', '.join(sorted(keys))}")
    try:
        return AutoQuantizationConfig.from_dict(dict(given))
    except (ImportError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as exc:
        text = " ".join(str(exc).split())[:300]
        raise EngineGone(f"quantization: {name} cannot be used so: {type(exc).__name__}: {text}") from exc


def method(given: Mapping[str, Any]) -> str:
    """What transformers calls the method. bitsandbytes is two, and goes by its flags."""
    for flag, name in (("load_in_4bit", "bitsandbytes_4bit"), ("load_in_8bit", "bitsandbytes_8bit")):
        if given.get(flag):
            return name
    return str(given.get("quant_method"))
