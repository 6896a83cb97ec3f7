"""How the next token is chosen, for each request by its own rules, whatever else is in the batch.

A token is drawn by the Gumbel-max trick: the largest of logits / T + noise is distributed as softmax(logits / T). It is
done as logits + T * noise, so that T = 0 is greedy with no special case, and with noise that is a hash of the request's
seed, the token's position and the token's id: the same request gives the same text alone or in company, on its first
delivery or its third, also where the cache was full and the sequence was prefilled again.
"""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.logits_process import LogitsProcessorList

_MASK = 2**64 - 1
# SplitMix64 (Steele, Lea, Flood 2014): its stream with state `key` at index `token` is the noise.
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_BELOW_ONE = 1 - 2**-24
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

    @property
    def restricted(self) -> bool:
        """Whether only some of the vocabulary may be drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


def sequence_seed(origin: int | str, choice: int) -> int:
    """64 bits from a request's own seed, or from its response id, and the choice's index.

    Hashed, not added: choice 1 of seed 1 must have nothing in common with choice 0 of seed 2.
    """
    kind = "seed" if isinstance(origin, int) else "id"
    return int.from_bytes(blake2b(f"{kind}:{origin}:{choice}".encode(), digest_size=8).digest())


def noise_key(seed: int, position: int) -> int:
    """64 bits, signed, from a sequence's seed and the position of the token to be drawn."""
    key = _mix(_mix((seed + _GAMMA) & _MASK) + position * _GAMMA & _MASK)
    return key - 2**64 if key >= 2**63 else key


def _mix(value: int) -> int:
    value = (value ^ (value >> 30)) * _MIX_1 & _MASK
    value = (value ^ (value >> 27)) * _MIX_2 & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def gumbel(keys: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, for int64 keys and token ids of shapes that broadcast. Finite, -2.8 to 22.9."""
    bits = (tokens * _signed(_GAMMA)).add(keys)  # int64 wraps, as it must
    # `&` makes torch's arithmetic shift a logical one.
    bits = bits.bitwise_xor_((bits >> 30).bitwise_and_(2**34 - 1)).mul_(_signed(_MIX_1))
    bits = bits.bitwise_xor_((bits >> 27).bitwise_and_(2**37 - 1)).mul_(_signed(_MIX_2))
    # The last step of the mix is for the low bits, and only the high ones are used.
    uniform = (bits >> 32).bitwise_and_(2**32 - 1).to(torch.float32)
    uniform = uniform.add_(0.5).mul_(2**-32).clamp_(max=_BELOW_ONE)
    # Small values keep their precision in log1p(-u), and they make the large noise that decides.
    return uniform.neg_().log1p_().neg_().log_().neg_()


def draw_full(scores: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
    """Scores [B, V] whose largest is the token drawn from the whole vocabulary. `temperature` and `keys` are [B]."""
    tokens = torch.arange(scores.size(-1), device=scores.device)
    return torch.addcmul(scores, temperature.unsqueeze(-1), gumbel(keys.unsqueeze(-1), tokens))


def keep(ordered: Tensor, log_total: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Which of each row's logits, divided by temperature and in descending order, may be drawn.

    First top_k, then top_p among what it left, as `generate` does; the likeliest always may. `log_total` [B] is the
    logarithm of the sum of the exponentials of what top_k left.
    """
    rank = torch.arange(ordered.size(-1), device=ordered.device)
    probabilities = (ordered - log_total.unsqueeze(-1)).exp()
    before = probabilities.cumsum(-1) - probabilities
    within_k = (rank < top_k.unsqueeze(-1)) | (top_k.unsqueeze(-1) == 0)
    limit = torch.where(top_p < 1, top_p, torch.inf).unsqueeze(-1)  # rounding takes `before` a little past 1
    return within_k & ((before < limit) | (rank == 0))


def draw_restricted(scores: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, keys: Tensor) -> Tensor:
    """As `draw_full`, for rows of which some have top_k or top_p, by a sort. Its work depends on shapes only."""
    values, tokens = scores.sort(dim=-1, descending=True, stable=True)
    scaled = (values - values[:, :1]) / temperature.clamp(min=1e-6).unsqueeze(-1)
    rank = torch.arange(scores.size(-1), device=scores.device)
    outside_k = (rank >= top_k.unsqueeze(-1)) & (top_k.unsqueeze(-1) > 0)
    log_total = scaled.masked_fill(outside_k, -torch.inf).logsumexp(-1)
    noisy = torch.addcmul(values, temperature.unsqueeze(-1), gumbel(keys.unsqueeze(-1), tokens))
    noisy = noisy.masked_fill(~keep(scaled, log_total, top_k, top_p), -torch.inf)
    return torch.full_like(scores, -torch.inf).scatter_(-1, tokens, noisy)


def draw_row(scores: Tensor, sampling: Sampling, key: int) -> Tensor:
    """As `draw_restricted` for one row [V] of a CPU, which looks at the likeliest tokens only."""
    size = scores.size(-1)
    count = min(sampling.top_k or _CANDIDATES, size)
    temperature = max(sampling.temperature, 1e-6)
    top_k, top_p = torch.tensor([sampling.top_k]), torch.tensor([sampling.top_p])
    log_total = None if sampling.top_k else ((scores - scores.max()) / temperature).logsumexp(-1, keepdim=True)
    while True:
        values, tokens = scores.topk(count)
        scaled = ((values - values[0]) / temperature).unsqueeze(0)
        total = scaled.logsumexp(-1) if log_total is None else log_total
        allowed = keep(scaled, total, top_k, top_p)[0]
        if count == size or sampling.top_k or not allowed[-1]:
            break
        count = min(count * 8, size)
    noisy = values + sampling.temperature * gumbel(torch.tensor(key), tokens)
    drawn = tokens[noisy.masked_fill(~allowed, -torch.inf).argmax()]
    return torch.full_like(scores, -torch.inf).index_fill_(-1, drawn.unsqueeze(0), 0.0)


class SamplingProcessors(ContinuousBatchingLogitsProcessorList):
    """The whole of sampling as one list of processors, which a manager with `do_sample=False` takes for its own.

    Each request brings its `Sampling` as the keyword argument `sampling`. Five rows of the batch's int32 tensor carry
    it to the device: temperature, top_k, top_p and the two halves of the noise's key.

    Args:
        static: The step's work must depend on shapes only, as CUDA graphs and compilation need. Otherwise it does what
            the batch at hand asks for: nothing for greedy requests, no sort where nobody has top_k or top_p.
    """

    ROWS = 5

    def __init__(self, *, static: bool) -> None:
        super().__init__(LogitsProcessorList())
        self._static = static
        self._batch: list[tuple[Sampling, int]] = []
        self.tensors_required = self.ROWS
        self.supported_keys = {"sampling": Sampling}
        self.do_processing = True

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Rows for requests that are not there: greedy."""
        int32_tensor.copy_(_rows([(Sampling(), 0)]).to(int32_tensor.device))

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        """Called with each step's requests, after their positions were moved to the token that is to be drawn."""
        self._batch = []
        for request in requests_in_batch:
            if request.has_new_token:
                sampling = request.state.logit_processor_kwargs.get("sampling", Sampling())
                self._batch.append((sampling, noise_key(sampling.seed, request.state.position_offset)))
        rows = _rows(self._batch)
        arg_storage[: self.ROWS, : rows.size(1)] = rows.to(arg_storage.device)
        return arg_storage

    def __call__(self, input_ids: Any, scores: Tensor, logits_processor_args: Tensor) -> Tensor:  # noqa: ARG002
        """Scores [B, V] whose largest is each request's next token."""
        if not self._static and scores.device.type == "cpu":
            return self._by_row(scores)
        rows = logits_processor_args[:, : scores.size(0)]
        temperature, top_k, top_p = rows[0].view(torch.float32), rows[1], rows[2].view(torch.float32)
        keys = (rows[3].to(torch.int64) << 32) | (rows[4].to(torch.int64) & 0xFFFFFFFF)
        if self._static or any(sampling.restricted for sampling, _ in self._batch):
            return draw_restricted(scores, temperature, top_k, top_p, keys)
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
            (keys >> 32).to(torch.int32),
            (keys & 0xFFFFFFFF).to(torch.int32),  # wraps: the bits are what counts
        ]
    )
