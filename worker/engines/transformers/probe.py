"""What a model makes of rows that run together: found out at load by trying, for families differ in what they mask."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Together(Enum):
    """Which rows may share a batch, so that each gets what it gets alone."""

    PADDED = "padded rows as it does single ones"
    EQUAL = "padded rows otherwise than single ones: only prompts of one length share a batch"
    ALONE = "rows of a batch otherwise than single ones: there is no batch"


def rows_together(model: PreTrainedModel) -> Together:
    """Try a short prompt alone, beside a longer one, and beside one of its length."""
    short, twin, longer = (
        [token % model.config.get_text_config().vocab_size for token in range(n, m)] for n, m in _TRIED
    )
    alone = _logits(model, [short])
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if _same(alone, _logits(model, [short, longer]), tolerance):
        return Together.PADDED
    return Together.EQUAL if _same(alone, _logits(model, [short, twin]), tolerance) else Together.ALONE


_TRIED = ((2, 5), (13, 16), (5, 12))


def model_inputs(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """What `generate` takes for some prompts of token ids: a decoder's are padded before, an encoder's behind them."""
    length = max(map(len, prompts))
    behind = model.config.is_encoder_decoder
    ids, mask = torch.zeros(2, len(prompts), length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if behind else slice(length - len(prompt), length)
        ids[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def _logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """The first prompt's [2, V] at its first two steps."""
    generate: Any = model.generate
    with torch.inference_mode():
        out = generate(
            **model_inputs(model, prompts), max_new_tokens=2, output_logits=True, return_dict_in_generate=True
        )
    return torch.stack([step[0].float() for step in out.logits])


def _same(alone: Tensor, together: Tensor, tolerance: float) -> bool:
    """Equal but for rounding. Where rounding tips the first token over, the second step says nothing."""
    steps = 2 if alone[0].argmax() == together[0].argmax() else 1
    allowed = tolerance * (alone.amax() - alone.amin())
    return bool(((alone - together)[:steps].abs() <= allowed).all())
