"""The rows of a static batch, and what happens to them at each step of `generate`."""

from asyncio import Future
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rejoinder.worker.engines.transformers.faults import no_number
from rejoinder.worker.engines.transformers.sampling import SamplingProcessors
from rejoinder.worker.errors import RetryableError


@dataclass(eq=False, slots=True)
class Row:
    """One sequence. It has what `SamplingProcessors` reads of a request of continuous batching, and of its state."""

    prompt: list[int]
    limit: int
    """New tokens, at most."""
    ends: frozenset[int]
    """Each of these tokens ends it."""
    stop: Callable[[list[int]], bool] | None
    initial_tokens: list[int]
    """Before the first new one, where new ones stand: the prompt, or what the decoder begins with."""
    logit_processor_kwargs: dict[str, Any]
    result: Future[list[int]]
    generated_tokens: list[int] = field(default_factory=list)
    """Written in the generation thread alone."""
    seen: int = 0
    """Tokens that `stop` was called for."""
    ended: bool = False
    """No more tokens are wanted. Set in either thread, never taken back."""
    has_new_token: bool = True

    @property
    def state(self) -> "Row":
        """Itself."""
        return self

    @property
    def position_offset(self) -> int:
        """The position of the token that is drawn next."""
        return len(self.initial_tokens) + len(self.generated_tokens)


News = tuple[Row, int, RetryableError | None]
"""A row, how many tokens it has, and what it failed with."""


def take(news: list[News]) -> None:
    """In the event loop: call `stop` for each new token, and end what has ended."""
    for row, count, error in news:
        if row.result.done():
            continue
        if error is not None:
            row.result.set_exception(error)
            continue
        end = None
        if row.stop is not None:
            try:
                # One token at a time, so that the end does not depend on how outputs were gathered.
                end = next((n for n in range(row.seen + 1, count + 1) if row.stop(row.generated_tokens[:n])), None)
            except Exception as exc:  # noqa: BLE001  # raised here it would lose the other rows' news
                row.ended = True
                row.result.set_exception(exc)
                continue
            row.seen = count
        if end is None and _complete(row, count):
            end = count
        if end is not None:
            row.ended = True
            row.result.set_result(row.generated_tokens[:end])


def _complete(row: Row, count: int) -> bool:
    return count >= row.limit or row.generated_tokens[count - 1] in row.ends


Listener = Callable[[list[News], int], bool]
"""Told of what is new after each step, and how many rows were in it; whether to go on."""

_IDLE = SimpleNamespace(has_new_token=True, state=SimpleNamespace(logit_processor_kwargs={}, position_offset=0))
"""What the sampling sees of a row that has ended."""


class Steps:
    """What one call of `generate` does at each of its steps."""

    def __init__(self, rows: Sequence[Row], device: torch.device, listener: Listener) -> None:
        self._rows = rows
        self._listener = listener
        self._step = 0
        self._sampling = SamplingProcessors(static=False)
        self._storage = torch.zeros(self._sampling.tensors_required, len(rows), dtype=torch.int32, device=device)

    def draw(self, _: Tensor, scores: Tensor) -> Tensor:
        """A logits processor: scores [B, V] whose largest is each row's next token."""
        args = self._sampling.prepare_tensor_args([_IDLE if row.ended else row for row in self._rows], self._storage)
        scores = self._sampling(None, scores, args)
        for place, row in enumerate(self._rows):
            if self._step < len(row.generated_tokens):  # of a call that failed: what was told is not told otherwise
                scores[place] = -torch.inf
                scores[place, row.generated_tokens[self._step]] = 0.0
        return scores

    def end(self, tokens: Tensor, _: Any, **__: Any) -> Tensor:
        """A stopping criterion: which rows [B] have ended with the newest of `tokens` [B, T]."""
        drawn, broken = torch.stack([tokens[:, -1], self._sampling.unusable.to(tokens.dtype)]).tolist()
        news: list[News] = []
        sequences = sum(not row.ended for row in self._rows)
        for row, token, failed in zip(self._rows, drawn, broken, strict=True):
            if row.ended:
                continue
            if failed:
                row.ended = True
                news.append((row, len(row.generated_tokens), no_number()))
            elif self._step >= len(row.generated_tokens):
                row.generated_tokens.append(token)
                row.ended = _complete(row, len(row.generated_tokens))
                if row.ended or row.stop is not None:
                    news.append((row, len(row.generated_tokens), None))
        self._step += 1
        goes_on = self._listener(news, sequences)
        done = [row.ended or not goes_on for row in self._rows]
        return torch.tensor(done, device=tokens.device)
