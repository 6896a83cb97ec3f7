"""Penalties on what a sequence has said already: on the logits, before anything else, so that greedy has them too.

vLLM's and transformers' meanings and order: first the repetition penalty, for each token of the prompt or the answer;
then OpenAI's frequency and presence penalties, for the answer's tokens alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST = 1e-30
"""A repetition penalty below float32's range would be 0, and a logit of 0 divided by it no number."""
_FIRST = 64


@dataclass(frozen=True, slots=True)
class Penalties:
    """What one sequence's tokens cost when they come again."""

    repetition: float = 1.0
    """Divides positive logits, multiplies negative ones."""
    presence: float = 0.0
    """Subtracted once."""
    frequency: float = 0.0
    """Subtracted once for each time."""

    @property
    def active(self) -> bool:
        """Whether any logit changes."""
        return self != NO_PENALTIES


NO_PENALTIES = Penalties()


def unseen(initial: Sequence[int], generated: Sequence[int], seen: int) -> list[int]:
    """The tokens of `initial + generated` from place `seen` on, at a cost of those alone."""
    return [*initial[seen:], *generated[max(0, seen - len(initial)) :]]


class History:
    """The different tokens of one sequence, and how often each was generated.

    It grows by the tokens that are new at each step: counting a long sequence anew for each of its tokens would take
    longer than a small model's step.

    Args:
        prompt: The sequence's true prompt. What transformers calls `initial_tokens` is more after a preemption.
        penalties: Without a repetition penalty the prompt's tokens need not be known.
    """

    def __init__(self, prompt: Sequence[int], penalties: Penalties) -> None:
        self._next = len(prompt)  # the place in the sequence of the first token that is not counted yet
        known = list(dict.fromkeys(prompt)) if penalties.repetition != 1 else []
        self._slots = {token: slot for slot, token in enumerate(known)}
        self._tokens = torch.zeros(max(_FIRST, 2 * len(known)), dtype=torch.int64)
        self._tokens[: len(known)] = torch.tensor(known, dtype=torch.int64)
        self._counts = torch.zeros(len(self._tokens))

    @property
    def tokens(self) -> Tensor:
        """Each once."""
        return self._tokens[: len(self._slots)]

    @property
    def counts(self) -> Tensor:
        """How often each of `tokens` was generated, as float32; 0 for those of the prompt only."""
        return self._counts[: len(self._slots)]

    def update(self, initial: Sequence[int], generated: Sequence[int]) -> None:
        """Count what is new of a sequence that is `initial + generated`, wherever a preemption has put the border."""
        new = unseen(initial, generated, self._next)
        for token in new:
            slot = self._slot(token)  # may replace `_counts` by a longer one
            self._counts[slot] += 1
        self._next += len(new)

    def _slot(self, token: int) -> int:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._tokens):
            self._tokens = torch.cat([self._tokens, torch.zeros_like(self._tokens)])
            self._counts = torch.cat([self._counts, torch.zeros_like(self._counts)])
        self._tokens[slot] = token
        return slot


def penalize(scores: Tensor, rows: Sequence[tuple[int, Penalties, History]]) -> None:
    """Change in place those logits of `scores` [B, V] that the given rows' penalties concern; nothing else is read."""
    lengths = torch.tensor([len(history.tokens) for _, _, history in rows])
    tokens = torch.cat([history.tokens for _, _, history in rows])
    row = torch.tensor([row for row, _, _ in rows]).repeat_interleave(lengths)
    values = [(max(p.repetition, _SMALLEST), p.presence, p.frequency) for _, p, _ in rows]
    factors = torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths, dim=0)
    counts = torch.cat([history.counts for _, _, history in rows])
    # Two transfers to the device instead of six.
    row, tokens = torch.stack([row, tokens]).to(scores.device)
    repetition, presence, frequency, counts = torch.stack([*factors.unbind(-1), counts]).to(scores.device)
    chosen = scores[row, tokens]
    chosen = torch.where(chosen < 0, chosen * repetition, chosen / repetition)
    scores[row, tokens] = chosen - frequency * counts - presence * (counts > 0)
