"""A GGUF file, made into what `from_pretrained` reads: dequantized to float32, as safetensors, with its tokenizer."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

from rejoinder.worker.engines.transformers.loading import quiet
from rejoinder.worker.errors import EngineGone

_QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
_ANSWER = "Paris"


def convert(source: Path, target: Path, step: Callable[[str], None]) -> None:
    """Convert one file and see that the result answers.

    Args:
        source: The GGUF file, of a decoder model with a chat template.
        target: An empty directory.
        step: Told what is done next.

    Raises:
        EngineGone: it is not a whole model, or it does not answer sensibly.
    """
    quiet()
    step("reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    step("reading the weights")
    # Not AutoModelForCausalLM.from_pretrained(gguf_file=...): it asks for the package accelerate, to no use here.
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    with _without_its_bar():
        checkpoint: Any = modeling_gguf_pytorch_utils.load_gguf_checkpoint(  # type: ignore[no-untyped-call]
            str(source), return_tensors=True, model_to_load=model, torch_dtype=torch.float32
        )
    result = model.load_state_dict(checkpoint["tensors"], strict=False)
    model.tie_weights()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if result.unexpected_keys or set(result.missing_keys) - tied:
        raise EngineGone(f"{source.name} is not a whole model: {result}")
    step("writing safetensors")
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)
    step("asking it something")
    _check(model.eval(), tokenizer)


@contextlib.contextmanager
def _without_its_bar() -> Iterator[None]:
    """Without the progress bar of the reading itself, which no setting turns off: `step` tells, and logs are lines."""
    reader: Any = modeling_gguf_pytorch_utils
    bar = reader.tqdm
    reader.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar


def _check(model: Any, tokenizer: Any) -> None:
    """Weights in a wrong order or a broken template raise nothing: they babble."""
    prompt = tokenizer.apply_chat_template(_QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(tokens, skip_special_tokens=True)
    if _ANSWER not in answer:
        raise EngineGone(f"the converted model answers {answer!r} when asked for the capital of France")
