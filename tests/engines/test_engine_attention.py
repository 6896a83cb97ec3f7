"""Attention of each sequence alone: what transformers' own says, token for token."""

import asyncio

import pytest
import torch
from engine_harness import CONTEXT, SMALL, build_tiny, tokens_of
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from rejoinder.worker.engines.transformers import attention
from rejoinder.worker.engines.transformers.continuous import ContinuousBatch
from rejoinder.worker.engines.transformers.loading import load
from rejoinder.worker.engines.transformers.sampling import Sampling
from rejoinder.worker.engines.transformers.settings import TransformersSettings
from rejoinder.worker.errors import EngineGone

WINDOW = 24
PER_PAGE = 2 * 2 * 2 * 8 * 4 * 16  # both of K and V, layers, heads, size, bytes, tokens


def build_sliding(directory):
    """The tiny model with Mistral's window, which most prompts outgrow."""
    build_tiny(directory)
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=WINDOW,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    MistralForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["full", "sliding"])
def model(request, tmp_path_factory, tiny):
    return tiny if request.param == "full" else build_sliding(tmp_path_factory.mktemp("sliding"))


def prompts():
    """Short ones, some of equal lengths, some with a shared prefix, and some longer than a step takes."""
    chance = torch.Generator().manual_seed(5)
    shared = torch.randint(2, 250, (70,), generator=chance).tolist()
    lengths = [1, 2, 9, 9, 9, 23, 24, 25, 48, 63, 64, 65, 90, 150]
    own = [torch.randint(2, 250, (length,), generator=chance).tolist() for length in lengths]
    return own + [shared + tail for tail in ([7], [8, 9], own[5], [7])]


def greedy(model, attn, **sizes):
    """The results, the attention in force and how often sequences were put back for want of cache."""
    settings = TransformersSettings(model=str(model), **{**SMALL, "attn": attn, **sizes})
    loaded = load(settings)
    batch = ContinuousBatch(loaded, settings)
    offloading, preempted = batch._manager.batch_processor.offloading_manager, []
    original = offloading.offload_requests
    offloading.offload_requests = lambda: preempted.append(None) or original()

    async def together():
        # The last one comes when the others' prefix is in the cache.
        *most, last = prompts()
        results = await asyncio.gather(*[tokens_of(batch, prompt, 40, Sampling()) for prompt in most])
        return [*results, await tokens_of(batch, last, 40, Sampling())]

    batch.start()
    try:
        return asyncio.run(together()), loaded.model.config._attn_implementation, len(preempted)
    finally:
        batch.stop()


@pytest.fixture(scope="module")
def wanted(model):
    """What `generate` says of each prompt alone."""
    alone = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    wanted = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        out = alone.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        wanted.append(out[0, len(prompt) :].tolist())
    return wanted


@pytest.mark.parametrize(
    ("attn", "used"),
    [("auto", attention.NAME), ("varlen", attention.NAME), ("sdpa", "sdpa"), ("eager", "paged|eager")],
)
def test_greedy_is_what_generate_says(model, wanted, attn, used):
    results, in_force, _ = greedy(model, attn)
    assert in_force == used
    assert results == wanted


def test_a_full_cache_changes_nothing(model, wanted):
    pages = 5 if model.name.startswith("sliding") else 16  # a window takes two pages of a sequence, however long
    results, _, preempted = greedy(model, "varlen", cache_bytes=pages * PER_PAGE)
    assert results == wanted
    assert preempted


def test_each_query_sees_what_it_should():
    """Against scores written out: offsets, windows, shared heads, equal neighbours."""
    chance = torch.Generator().manual_seed(1)
    for count, len_q, len_k, window, heads in [
        (1, 1, 9, None, 4),
        (3, 1, 9, None, 2),
        (1, 6, 6, None, 4),
        (2, 6, 6, 3, 4),
        (2, 4, 9, None, 2),
        (1, 4, 9, 3, 4),
        (1, 5, 6, 24, 4),
    ]:
        q = torch.randn(count, heads, len_q, 8, generator=chance)
        k, v = (torch.randn(count, 2, len_k, 8, generator=chance) for _ in range(2))
        at = torch.arange(len_q)[:, None] + len_k - len_q
        seen = (torch.arange(len_k) <= at) & (torch.arange(len_k) > at - (window or len_k))
        wide = [states.repeat_interleave(heads // 2, 1) for states in (k, v)]
        scores = (q @ wide[0].mT * 0.5).masked_fill(~seen, -torch.inf)
        want = (scores.softmax(-1) @ wide[1]).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(attention._attend(q, k, v, window, 0.5), want)


def test_no_mask_of_the_whole_batch_is_made(tiny):
    settings = TransformersSettings(model=str(tiny), **SMALL)
    batch = ContinuousBatch(load(settings), settings)
    assert batch._manager.batch_processor.inputs_and_outputs.attention_mask is None


def test_a_model_that_caps_its_scores_keeps_its_own(tiny):
    settings = TransformersSettings(model=str(tiny), **SMALL)
    loaded = load(settings)
    loaded.model.config.attn_logit_softcapping = 50.0
    attention.choose(loaded.model, "auto")
    assert loaded.model.config._attn_implementation == "sdpa"
    with pytest.raises(EngineGone, match="caps its attention scores"):
        ContinuousBatch(loaded, settings.model_copy(update={"attn": "varlen"}))


def test_without_a_paged_cache_it_says_so(tiny):
    loaded = load(TransformersSettings(model=str(tiny), **SMALL))
    attention.choose(loaded.model, "varlen")
    with pytest.raises(ValueError, match="is for continuous batching"):
        loaded.model(torch.tensor([[5, 6]]))
