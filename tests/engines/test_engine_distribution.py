"""Sequences are distributed as `model.generate(do_sample=True)` draws them: two samples, one chi-square."""

import asyncio
import math
from collections import Counter

import pytest
import torch
from engine_harness import SMALL, tokens_of
from transformers import LlamaConfig, LlamaForCausalLM

from rejoinder.worker.engines.sequences import sequence_seed
from rejoinder.worker.engines.transformers.continuous import ContinuousBatch
from rejoinder.worker.engines.transformers.loading import LoadedModel
from rejoinder.worker.engines.transformers.sampling import Sampling
from rejoinder.worker.engines.transformers.settings import TransformersSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

VOCABULARY = 10
PROMPT = [3, 1, 4]
SEQUENCES = 2000
# transformers applies min_p after top_k and top_p, we before, as vLLM: together they are another distribution.
KINDS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.8, "top_k": 3, "top_p": 0.9},
    {"temperature": 1.5, "min_p": 0.2},
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def drawn_by_generate(model):
    """For each kind, how often each pair of tokens came; before the batch switches the model's attention."""
    prompts = torch.tensor([PROMPT] * SEQUENCES)
    counts = []
    for number, kind in enumerate(KINDS):
        torch.manual_seed(number)
        drawn = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            max_new_tokens=2,
            pad_token_id=0,
            **{"top_k": 0, "top_p": 1.0, **kind},
        )
        counts.append(Counter(map(tuple, drawn[:, len(PROMPT) :].tolist())))
    return counts


@pytest.fixture(scope="module")
def batch(model, drawn_by_generate):
    loaded = LoadedModel(model, None, 32, VOCABULARY, frozenset())
    settings = TransformersSettings(model="tiny", **{**SMALL, "max_batch_tokens": 256, "max_running": 64})
    batch = ContinuousBatch(loaded, settings)
    batch.start()
    yield batch
    batch.stop()


def distance(one, two):
    """The two-sample chi-square of equally many draws, in standard deviations from what equal distributions give.

    Cells that seldom came are one.
    """
    pairs = [(one[cell], two[cell]) for cell in one | two]
    often = [pair for pair in pairs if sum(pair) >= 10]
    seldom = [pair for pair in pairs if sum(pair) < 10]
    cells = [*often, (sum(a for a, _ in seldom), sum(b for _, b in seldom))] if seldom else often
    freedom = len(cells) - 1
    return (sum((a - b) ** 2 / (a + b) for a, b in cells) - freedom) / math.sqrt(2 * freedom)


async def test_pairs_of_tokens_come_as_often_as_from_generate(batch, drawn_by_generate):
    for number, kind in enumerate(KINDS):
        samplings = [Sampling(**kind, seed=sequence_seed(number, i)) for i in range(SEQUENCES)]
        drawn = await asyncio.gather(*[tokens_of(batch, PROMPT, 2, sampling) for sampling in samplings])
        counts = Counter(map(tuple, drawn))
        assert distance(counts, drawn_by_generate[number]) < 4, kind
        for other, foreign in enumerate(drawn_by_generate):
            assert other == number or distance(counts, foreign) > 8, (kind, KINDS[other])
