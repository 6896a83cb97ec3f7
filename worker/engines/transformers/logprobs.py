"""Log-probabilities of the tokens drawn and of the likeliest ones: of the model's own distribution.

Before temperature, penalties and grammar, which is vLLM's default (`raw_logprobs`). They are computed in the step that
draws the token, for the rows that ask alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Of one place in a sequence."""

    logprob: float
    """Of the token that was drawn."""
    top: list[tuple[int, float]]
    """Token ids and log-probabilities of the likeliest ones, likeliest first."""


class Record:
    """The log-probabilities of one sequence, written by the thread that generates.

    A step that was made again writes its place again.

    Args:
        prompt_tokens: The sequence's true prompt is so long, whatever a preemption calls its initial tokens.
        alternatives: How many likeliest tokens to keep at each place.
    """

    def __init__(self, prompt_tokens: int, alternatives: int) -> None:
        self.alternatives = alternatives
        self._prompt_tokens = prompt_tokens
        self._place = 0
        self._entries: list[TokenLogprob] = []

    def begin(self, length: int) -> None:
        """The next entry is of the token behind `length` others, the prompt's included."""
        self._place = length - self._prompt_tokens

    def write(self, entry: TokenLogprob) -> None:
        """Set the entry of the place that was begun."""
        self._entries[self._place :] = [entry]

    def first(self, count: int) -> list[TokenLogprob]:
        """The entries of the first `count` tokens, all of which must have been delivered."""
        return self._entries[:count]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: a preemption copies what a sequence brought, and goes on with the copy."""
        return self


def write(records: Sequence[Record], logits: Tensor, drawn: Tensor) -> None:
    """Write one place of each record.

    Args:
        records: One for each row.
        logits: The model's own, float32 [R, V].
        drawn: Token ids, int64 [R].
    """
    total = logits.logsumexp(-1, keepdim=True)
    top = logits.topk(min(max(1, *(record.alternatives for record in records)), logits.size(-1)))
    chosen = logits.gather(-1, drawn.unsqueeze(-1))
    # One transfer for the values and one for the ids.
    values: list[list[float]] = (torch.cat([chosen, top.values], dim=-1) - total).tolist()
    tokens: list[list[int]] = top.indices.tolist()
    for record, value, ids in zip(records, values, tokens, strict=True):
        likeliest = list(zip(ids, value[1:], strict=True))[: record.alternatives]
        record.write(TokenLogprob(value[0], likeliest))
