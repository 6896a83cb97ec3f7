"""How the next token is chosen, for each request by its own rules, whatever else is in the batch.

A token is drawn by the Gumbel-max trick: the largest of logits / T + noise is distributed as softmax(logits / T). It is
done as logits + T * noise, so that T = 0 is greedy with no special case, and with noise that is a hash of the request's
seed, the token's position and the token's id: the same request gives the same text alone or in company, on its first
delivery or its third, also where the cache was full and the sequence was prefilled again.

The order is vLLM's: penalties, grammar, temperature, min_p, top_k, top_p among what these left, the draw.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.logits_process import LogitsProcessorList

from rejoinder.worker.engines.transformers.grammar import Grammar, Progress, restrict
from rejoinder.worker.engines.transformers.logprobs import Record, write
from rejoinder.worker.engines.transformers.noise import gumbel, noise_key
from rejoinder.worker.engines.transformers.penalties import NO_PENALTIES, History, Penalties, penalize

_CANDIDATES = (
    1024  # top_p alone looks at this many tokens first: 0.4 ms for 49,152 logits on a CPU, a sort takes 3.4 ms
)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one sequence's tokens are chosen."""

    temperature: float = 0.0
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    seed: int = 0
    """64 bits."""
    min_p: float = 0.0
    """Least probability, as a share of the likeliest token's. 0: off."""
    penalties: Penalties = NO_PENALTIES
    logprobs: int | None = None
    """Keep the log-probabilities of its tokens, and of so many likeliest ones at each place. None: of none."""
    grammar: Grammar | None = None
    """What its text must be."""

    @property
    def restricted(self) -> bool:
        """Whether only some of the vocabulary may be drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def floor(self) -> float:
        """The logarithm of `min_p`: taken here once, so that no device rounds it otherwise."""
        return math.log(self.min_p) if self.min_p > 0 else -math.inf


def followed(sampling: Sampling, prompt: Sequence[int]) -> dict[str, Any]:
    """What one sequence brings for `SamplingProcessors`: its sampling, and what follows its tokens if it needs that.

    `prompt` is its true one.
    """
    brought: dict[str, Any] = {"sampling": sampling}
    if sampling.penalties.active:
        brought["history"] = History(prompt, sampling.penalties)
    if sampling.logprobs is not None:
        brought["record"] = Record(len(prompt), sampling.logprobs)
    if sampling.grammar is not None:
        brought["progress"] = sampling.grammar.begin(len(prompt))
    return brought


def draw_full(scores: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
    """Scores [B, V] whose largest is the token drawn from the whole vocabulary. `temperature` and `keys` are [B]."""
    tokens = torch.arange(scores.size(-1), device=scores.device)
    return torch.addcmul(scores, temperature.unsqueeze(-1), gumbel(keys.unsqueeze(-1), tokens))


@dataclass(frozen=True, slots=True)
class Restriction:
    """What some rows [B] restrict the draw to."""

    top_k: Tensor
    top_p: Tensor
    floor: Tensor
    """Of `Sampling.floor`."""

    def within(self, ordered: Tensor) -> Tensor:
        """Which logits min_p and top_k leave: each row's in descending order, less the largest, over temperature."""
        rank = torch.arange(ordered.size(-1), device=ordered.device)
        top_k = self.top_k.unsqueeze(-1)
        return ((rank < top_k) | (top_k == 0)) & (ordered >= self.floor.unsqueeze(-1))

    def keep(self, ordered: Tensor, log_total: Tensor) -> Tensor:
        """Which of the same logits may be drawn: those that top_p leaves of `within`, and always the likeliest.

        `log_total` [B] is the logarithm of the sum of the exponentials of what is within.
        """
        probabilities = (ordered - log_total.unsqueeze(-1)).exp()
        before = probabilities.cumsum(-1) - probabilities
        limit = torch.where(self.top_p < 1, self.top_p, torch.inf)  # rounding takes `before` a little past 1
        likeliest = torch.arange(ordered.size(-1), device=ordered.device) == 0
        return (self.within(ordered) & (before < limit.unsqueeze(-1))) | likeliest


def draw_restricted(scores: Tensor, temperature: Tensor, restriction: Restriction, keys: Tensor) -> Tensor:
    """As `draw_full`, for rows of which some are restricted, by a sort. Its work depends on shapes only."""
    values, tokens = scores.sort(dim=-1, descending=True, stable=True)
    scaled = (values - values[:, :1]) / temperature.clamp(min=1e-6).unsqueeze(-1)
    log_total = scaled.masked_fill(~restriction.within(scaled), -torch.inf).logsumexp(-1)
    noisy = torch.addcmul(values, temperature.unsqueeze(-1), gumbel(keys.unsqueeze(-1), tokens))
    noisy = noisy.masked_fill(~restriction.keep(scaled, log_total), -torch.inf)
    return torch.full_like(scores, -torch.inf).scatter_(-1, tokens, noisy)


def draw_row(scores: Tensor, sampling: Sampling, key: int) -> Tensor:
    """As `draw_restricted` for one row [V] of a CPU, which looks at the likeliest tokens only."""
    size = scores.size(-1)
    count = min(sampling.top_k or _CANDIDATES, size)
    temperature = max(sampling.temperature, 1e-6)
    restriction = Restriction(*(torch.tensor([value]) for value in (sampling.top_k, sampling.top_p, sampling.floor)))
    log_total = None if sampling.top_k else _log_total((scores - scores.max()) / temperature, sampling.floor)
    while True:
        values, tokens = scores.topk(count)
        scaled = ((values - values[0]) / temperature).unsqueeze(0)
        total = _log_total(scaled, sampling.floor) if log_total is None else log_total
        allowed = restriction.keep(scaled, total)[0]
        if count == size or sampling.top_k or not allowed[-1]:
            break
        count = min(count * 8, size)
    noisy = values + sampling.temperature * gumbel(torch.tensor(key), tokens)
    drawn = tokens[noisy.masked_fill(~allowed, -torch.inf).argmax()]
    return torch.full_like(scores, -torch.inf).index_fill_(-1, drawn.unsqueeze(0), 0.0)


def _log_total(scaled: Tensor, floor: float) -> Tensor:
    within = scaled if floor == -math.inf else scaled.masked_fill(scaled < floor, -torch.inf)
    return within.logsumexp(-1).reshape(1)


class SamplingProcessors(ContinuousBatchingLogitsProcessorList):
    """The whole of sampling as one list of processors, which a manager with `do_sample=False` takes for its own.

    Each request brings its `Sampling` as the keyword argument `sampling`. Six rows of the batch's int32 tensor carry
    it to the device: temperature, top_k, top_p, min_p's logarithm and the two halves of the noise's key. What else it
    brings is in `followed`.

    Args:
        static: The step's work must depend on shapes only, as CUDA graphs and compilation need. Otherwise it does what
            the batch at hand asks for: nothing for greedy requests, no sort where nobody is restricted. A static step
            cannot see what a sequence has said so far: it takes only `sampling`, without penalties.
    """

    ROWS = 6

    def __init__(self, *, static: bool) -> None:
        super().__init__(LogitsProcessorList())
        self.static = static
        self._batch: list[tuple[Sampling, int]] = []
        self._penalized: list[tuple[int, Penalties, History]] = []
        self.unusable = torch.zeros(0, dtype=torch.bool)
        """Of the last step's rows [B], those from which no token can be drawn."""
        self._guided: list[tuple[int, Progress]] = []
        self._recorded: list[tuple[int, Record]] = []
        self.tensors_required = self.ROWS
        self.supported_keys = {"sampling": Sampling, "history": History, "progress": Progress, "record": Record}
        self.do_processing = True

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Rows for requests that are not there: greedy."""
        int32_tensor.copy_(_rows([(Sampling(), 0)]).to(int32_tensor.device))

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        """Called with each step's requests, after their positions were moved to the token that is to be drawn."""
        self._batch, self._penalized, self._guided, self._recorded = [], [], [], []
        for request in requests_in_batch:
            if request.has_new_token:
                state, row = request.state, len(self._batch)
                brought = state.logit_processor_kwargs
                sampling = brought.get("sampling", Sampling())
                if history := brought.get("history"):
                    history.update(state.initial_tokens, state.generated_tokens)
                    self._penalized.append((row, sampling.penalties, history))
                if progress := brought.get("progress"):
                    progress.update(state.initial_tokens, state.generated_tokens)
                    self._guided.append((row, progress))
                if record := brought.get("record"):
                    record.begin(len(state.initial_tokens) + len(state.generated_tokens))
                    self._recorded.append((row, record))
                self._batch.append((sampling, noise_key(sampling.seed, state.position_offset)))
        rows = _rows(self._batch)
        arg_storage[: self.ROWS, : rows.size(1)] = rows.to(arg_storage.device)
        return arg_storage

    def __call__(self, input_ids: Any, scores: Tensor, logits_processor_args: Tensor) -> Tensor:  # noqa: ARG002
        """Scores [B, V] whose largest is each request's next token."""
        if self.static:
            return self._by_tensor(scores, logits_processor_args)
        rows = torch.tensor([row for row, _ in self._recorded], dtype=torch.int64, device=scores.device)
        raw = scores[rows] if self._recorded else None
        if self._penalized:
            penalize(scores, self._penalized)
        if self._guided:
            restrict(scores, self._guided)
        self.unusable = ~scores.amax(-1).isfinite()  # a maximum tells of NaN, of +inf, and of nothing but -inf
        on_cpu = scores.device.type == "cpu"
        drawn = self._by_row(scores) if on_cpu else self._by_tensor(scores, logits_processor_args)
        if raw is not None:
            # The argmax of the whole, as the runner takes it: of equal scores it must be the same one.
            write([record for _, record in self._recorded], raw, drawn.argmax(-1)[rows])
        return drawn

    def _by_tensor(self, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """The whole batch at once, as a device likes it."""
        rows = logits_processor_args[:, : scores.size(0)]
        temperature = rows[0].view(torch.float32)
        keys = (rows[4].to(torch.int64) << 32) | (rows[5].to(torch.int64) & 0xFFFFFFFF)
        if self.static or any(sampling.restricted for sampling, _ in self._batch):
            restriction = Restriction(rows[1], rows[2].view(torch.float32), rows[3].view(torch.float32))
            return draw_restricted(scores, temperature, restriction, keys)
        if any(sampling.temperature > 0 for sampling, _ in self._batch):
            return draw_full(scores, temperature, keys)
        return scores

    def _by_row(self, scores: Tensor) -> Tensor:
        """One row at a time stays in the processor's cache, and each does only what its request asks for."""
        for row, (sampling, key) in zip(scores, self._batch, strict=False):
            if sampling.restricted:
                row.copy_(draw_row(row, sampling, key))
            elif sampling.temperature > 0:
                temperature = torch.tensor([sampling.temperature])
                row.copy_(draw_full(row.unsqueeze(0), temperature, torch.tensor([key]))[0])
        return scores


def _rows(batch: list[tuple[Sampling, int]]) -> Tensor:
    samplings = [sampling for sampling, _ in batch]
    keys = torch.tensor([key for _, key in batch], dtype=torch.int64)
    return torch.stack(
        [
            torch.tensor([s.temperature for s in samplings], dtype=torch.float32).view(torch.int32),
            torch.tensor([s.top_k for s in samplings], dtype=torch.int32),
            torch.tensor([s.top_p for s in samplings], dtype=torch.float32).view(torch.int32),
            torch.tensor([s.floor for s in samplings], dtype=torch.float32).view(torch.int32),
            (keys >> 32).to(torch.int32),
            (keys & 0xFFFFFFFF).to(torch.int32),  # wraps: the bits are what counts
        ]
    )
