"""Noise that is a hash of a seed, a position and a token's id: no generator, so no state to lose."""

import torch
from torch import Tensor

_MASK = 2**64 - 1
# SplitMix64 (Steele, Lea, Flood 2014): its stream with state `key` at index `token` is the noise.
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_BELOW_ONE = 1 - 2**-24


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
