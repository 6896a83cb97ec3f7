"""Attention over a packed batch that works on each sequence alone: `varlen`.

transformers packs all sequences of a step into one row and hands sdpa one `[1, 1, Q, KV]` mask, so that attention costs
sum(Q) x sum(KV), nearly all of it masked out. Here each sequence attends to its own keys only, and no mask of the whole
batch is made: it costs the sum of Q x KV.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any, cast

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from rejoinder.worker.engines.transformers.settings import Attention

# With "flash" in its name transformers hands over sequence lengths and makes no mask. A digit after it would be taken
# for a version of FlashAttention, whose kernels are then looked for.
NAME = "rejoinder_varlen_flash"


def choose(model: PreTrainedModel, attn: Attention, *, compiled: bool = False) -> None:
    """Set how a model that is loaded on its device computes attention in continuous batching.

    Args:
        model: As transformers loaded it, with the attention that its family prefers.
        attn: auto: `varlen` on a CPU where it can stand in for sdpa, else what the model was loaded with.
        compiled: Whether steps are compiled. transformers compiles none with `varlen`: auto does not choose it then.

    Raises:
        ValueError: this model cannot have what was asked for.
    """
    if attn == "auto":
        if model.device.type == "cpu" and not compiled and not _why_not(model):
            _set(model)
    elif attn == "varlen":
        if why := _why_not(model):
            raise ValueError(f"attn is varlen, but {why}: set attn to auto")
        _set(model)
    elif attn == "flash":
        model.set_attn_implementation(_flash(model))
    else:
        model.set_attn_implementation(attn)


def in_force(model: PreTrainedModel) -> str:
    """How a model computes attention: `varlen`, or what transformers calls it."""
    name = str(model.config._attn_implementation)
    return "varlen" if name == NAME else name


def _why_not(model: PreTrainedModel) -> str | None:
    """What keeps this model from `varlen`, which computes what sdpa does, and no variation of it."""
    config: Any = model.config.get_text_config()
    if model.config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        return "this model's attention is not sdpa's"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "this model caps its attention scores"
    return _why_no_kernel(model, config) if model.device.type == "cuda" else None


def _why_no_kernel(model: PreTrainedModel, config: Any) -> str | None:
    """What PyTorch's kernel, FlashAttention 2 as PyTorch carries it, refuses: as its source checks it."""
    if why := _not_half(model):
        return why
    if not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch was built without FlashAttention"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = getattr(config, "v_head_dim", None)
    if size % 8 or size > 256:
        return f"its heads have {size} dimensions, where the kernel takes multiples of 8 up to 256"
    if values is not None and values != getattr(config, "qk_head_dim", size):
        return "its values are of another size than its keys"
    return None


def _not_half(model: PreTrainedModel) -> str | None:
    if model.dtype not in {torch.bfloat16, torch.float16}:
        return "on a GPU it needs dtype bfloat16 or float16"
    major, minor = torch.cuda.get_device_capability(model.device)
    return None if major >= 8 else f"it needs compute capability 8.0, where this GPU has {major}.{minor}"


def _flash(model: PreTrainedModel) -> str:
    """The FlashAttention that is installed, as transformers calls it, which would fetch one where none is."""
    if why := _not_half(model):
        raise ValueError(f"attn is flash, but {why}")
    if is_flash_attn_3_available() and torch.cuda.get_device_capability(model.device)[0] >= 9:
        return "flash_attention_3"
    if is_flash_attn_2_available():
        return "flash_attention_2"
    raise ValueError("attn is flash, but the package flash-attn is not installed: install it, or set attn to auto")


def _set(model: PreTrainedModel) -> None:
    # set_attn_implementation would import FlashAttention because of the name. Some parts have configs of their own.
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) is not None:
            config._attn_implementation = NAME  # type: ignore[union-attr]  # not None: it has the attribute


def varlen_attention(  # noqa: PLR0917  # transformers' signature
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention, as transformers calls it in continuous batching.

    Args:
        module: The layer.
        query: `[1, heads, Q, size]`, all sequences of the step after one another.
        key: `[1, key heads, Q, size]`, of the new tokens; the cache has the others.
        value: As `key`.
        attention_mask: None, by this function's name.
        scaling: Of the scores. Default: one over the root of size.
        cache: transformers' paged cache. Updating it gives the keys and values of all sequences after one another.
        kwargs: What the cache needs, and `cu_seq_lens_q`, `cu_seq_lens_k`: where each sequence begins and ends.

    Returns:
        `[1, Q, heads, size]`.
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if cache is None or attention_mask is not None or unknown:
        what = ", ".join(unknown) or "a mask"
        raise ValueError(f"attention {NAME} is for continuous batching, without {what}: set attn to sdpa")
    layer: int = module.layer_idx  # type: ignore[assignment]
    window: int | None = getattr(cache.layer_to_allocator[layer], "sliding_window", None)
    key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=kwargs)
    if query.is_cuda:
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        return _on_gpu(q, k, v, window, scaling, kwargs)[None], None
    runs = list(_runs(kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()))
    # Split at once: a slice for each sequence made a step of 32 short ones half again as long.
    q_runs = torch.split_with_sizes(query, [count * len_q for count, len_q, _ in runs], 2)
    k_sizes = [count * len_k for count, _, len_k in runs]
    k_runs, v_runs = (torch.split_with_sizes(states, k_sizes, 2) for states in (key, value))
    parts = [
        _attend(_rows(q, count), _rows(k, count), _rows(v, count), window, scaling)
        for (count, _, _), q, k, v in zip(runs, q_runs, k_runs, v_runs, strict=True)
    ]
    return torch.cat(parts)[None], None


AttentionInterface.register(NAME, varlen_attention)


def _runs(ends_q: list[int], ends_k: list[int]) -> Iterator[tuple[int, int, int]]:
    """How many neighbours have the same lengths, and these lengths: they are one batch without copying anything."""
    lengths_q = [end - start for start, end in pairwise(ends_q)]
    lengths_k = [end - start for start, end in pairwise(ends_k)]
    for (length_q, length_k), run in groupby(zip(lengths_q, lengths_k, strict=True)):
        if length_q:
            yield len(list(run)), length_q, length_k


def _rows(states: torch.Tensor, count: int) -> torch.Tensor:
    """`[1, heads, count * length, size]` as `[count, heads, length, size]`."""
    return states if count == 1 else torch.unflatten(states[0], 1, (count, -1)).transpose(0, 1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, scaling: float | None
) -> torch.Tensor:
    """Attention of sequences of one length, `[count, heads, length, size]`; returns `[count * Q, heads, size]`.

    The queries are the last ones of the keys' positions, where sdpa's own `is_causal` takes them for the first.
    """
    (count, heads, len_q, _), (_, key_heads, len_k, size) = q.shape, v.shape
    if len_q == 1:  # it sees all its keys; the heads that share one are its queries, so that keys are not repeated
        packed = q.reshape(count, key_heads, heads // key_heads, -1)
        return scaled_dot_product_attention(packed, k, v, scale=scaling).reshape(count, heads, size)
    windowed = window is not None and len_k > window
    mask = None if len_q == len_k and not windowed else _mask(q, len_k, window if windowed else None)
    output = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=heads != key_heads
    )
    return output.transpose(1, 2).flatten(0, 1)


def _mask(q: torch.Tensor, len_k: int, window: int | None) -> torch.Tensor:
    """Of one sequence: nothing after a query's own position, and with a window no more than that many up to it."""
    before = len_k - q.shape[2]
    hidden = q.new_full((q.shape[2], len_k), -torch.inf)
    after = hidden.triu(before + 1)
    return after if window is None else after + hidden.tril(before - window)


def _on_gpu(  # noqa: PLR0917
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, scaling: float | None, lengths: Any
) -> torch.Tensor:
    """All sequences in one kernel. Not run yet on any GPU, so `auto` never chooses it.

    Its source: lengths are int32; queries are the last of the keys' positions; a window is how many keys before a
    query's own; heads that share a key need no repeating. It wants the last dimension contiguous, which views of the
    cache have, but a model may hand over others.
    """
    output = varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        lengths["cu_seq_lens_q"],
        lengths["cu_seq_lens_k"],
        lengths["max_length_q"],
        lengths["max_length_k"],
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return cast("torch.Tensor", output)
