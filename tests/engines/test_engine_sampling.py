"""The noise is noise, and the tokens are distributed as their softmax says."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rejoinder.worker.engines.sequences import sequence_seed
from rejoinder.worker.engines.transformers.noise import gumbel, noise_key
from rejoinder.worker.engines.transformers.sampling import (
    Restriction,
    Sampling,
    SamplingProcessors,
    draw_full,
    draw_restricted,
    draw_row,
)

LOGITS = torch.tensor([2.0, 1.5, 1.2, 0.9, 0.5, 0.1, -0.3, -0.8, -1.0, -2.0])
DRAWS = 20_000
KINDS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5),
    Sampling(temperature=2.0),
    Sampling(temperature=1.0, top_k=3),
    Sampling(temperature=1.0, top_p=0.6),
    Sampling(temperature=0.7, top_k=6, top_p=0.8),
    Sampling(temperature=1.5, top_k=1),
    Sampling(temperature=1.0, top_p=1e-9),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=2.0, min_p=0.4),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=1.0, min_p=0.3, top_p=0.8),
    Sampling(temperature=1.5, min_p=0.1, top_k=4, top_p=0.9),
]


def expected(sampling):
    """The probabilities by which `generate` draws, but min_p comes first, as in vLLM."""
    scores = LOGITS.unsqueeze(0)
    scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores.softmax(-1)[0]


def chi_square(tokens, probabilities):
    """How far counts are from what is expected, in standard deviations of the statistic."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert not counts[~possible].any()
    wanted = probabilities[possible].double() * len(tokens)
    freedom = int(possible.sum()) - 1
    if not freedom:
        return 0.0
    return float((((counts[possible] - wanted) ** 2 / wanted).sum() - freedom) / math.sqrt(2 * freedom))


def keys(seed, count=DRAWS):
    return torch.tensor([noise_key(seed, position) for position in range(count)])


def rows(sampling, count):
    values = (sampling.top_k, sampling.top_p, sampling.floor)
    return torch.full((count,), sampling.temperature), Restriction(*(torch.full((count,), value) for value in values))


@pytest.mark.parametrize("seed", [0, 1, sequence_seed("id", 0)])
@pytest.mark.parametrize("sampling", KINDS, ids=str)
def test_draws_follow_the_softmax(sampling, seed):
    temperature, restriction = rows(sampling, DRAWS)
    scores = LOGITS.expand(DRAWS, -1)
    if sampling.restricted:
        drawn = draw_restricted(scores, temperature, restriction, keys(seed))
    else:
        drawn = draw_full(scores, temperature, keys(seed))
    assert chi_square(drawn.argmax(-1), expected(sampling)) < 5


@pytest.mark.parametrize("sampling", [kind for kind in KINDS if kind.restricted], ids=str)
def test_rows_of_a_cpu_follow_it_too(sampling):
    drawn = [int(draw_row(LOGITS, sampling, int(key)).argmax()) for key in keys(7, 4000)]
    assert chi_square(torch.tensor(drawn), expected(sampling)) < 5


@pytest.mark.parametrize("other", ["next position", "next seed", "next choice"])
def test_neighbouring_draws_are_independent(other):
    one = keys(3)
    two = {
        "next position": lambda: keys(3, DRAWS + 1)[1:],
        "next seed": lambda: keys(4),
        "next choice": lambda: keys(sequence_seed(3, 1)),
    }[other]()
    temperature = torch.ones(DRAWS)
    first, second = (draw_full(LOGITS.expand(DRAWS, -1), temperature, key).argmax(-1) for key in (one, two))
    p = expected(Sampling(temperature=1.0))
    assert chi_square(first * len(p) + second, torch.outer(p, p).flatten()) < 5


def test_the_noise_is_gumbels():
    noise = gumbel(keys(11, 200).unsqueeze(-1), torch.arange(5000)).double()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772157) < 0.005
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    flat = noise.flatten()
    for x in (-1.0, 0.0, 1.0, 3.0, 6.0):
        assert abs((flat < x).double().mean() - math.exp(-math.exp(-x))) < 0.002
    assert gumbel(torch.tensor([-(2**63), 2**63 - 1, 0]), torch.tensor([0, 2**31, 5])).isfinite().all()


def test_the_two_ways_draw_the_same():
    torch.manual_seed(0)
    for size, count in ((300, 40), (5000, 40)):
        scores = torch.randn(count, size) * torch.linspace(0.01, 8, count).unsqueeze(-1)
        for kind in (
            *KINDS,
            Sampling(temperature=2.0, top_p=0.999),
            Sampling(temperature=2.0, min_p=0.01),
            Sampling(temperature=0.3, top_k=200, top_p=0.99),
        ):
            if kind.restricted:
                want = draw_restricted(scores, *rows(kind, count), keys(5, count)).argmax(-1)
                have = [
                    int(draw_row(row, kind, int(key)).argmax()) for row, key in zip(scores, keys(5, count), strict=True)
                ]
                assert (want == torch.tensor(have)).float().mean() > 0.99  # a rounding at the edge of top_p


def test_extremes_are_greedy_or_finite():
    scores = torch.tensor([[1.0, 3.0, 2.0]])
    for temperature in (0.0, 1e-30, 1e-12):
        assert draw_full(scores, torch.tensor([temperature]), keys(1, 1)).argmax() == 1
        args = rows(Sampling(temperature=temperature, top_k=2, top_p=0.5), 1)
        assert draw_restricted(scores, *args, keys(1, 1)).argmax() == 1
    tied = torch.zeros(1, 4)
    assert int(draw_row(tied[0], Sampling(temperature=1.0, top_p=0.5), 1).argmax()) in range(4)


def a_batch(kinds, position=10):
    return [
        SimpleNamespace(
            has_new_token=True,
            state=SimpleNamespace(logit_processor_kwargs={"sampling": kind}, position_offset=position),
        )
        for kind in kinds
    ]


@pytest.mark.parametrize("static", [False, True])
def test_a_row_does_not_depend_on_the_others(static):
    torch.manual_seed(1)
    kinds = [replace(k, seed=seed) for seed, k in enumerate([*KINDS, Sampling()])]
    scores = torch.randn(len(kinds), 2000) * 3

    def tokens(order):
        processors = SamplingProcessors(static=static)
        storage = torch.zeros(processors.tensors_required, 16, dtype=torch.int32)
        args = processors.prepare_tensor_args(a_batch([kinds[i] for i in order]), storage)
        return dict(zip(order, processors(None, scores[order].clone(), args).argmax(-1).tolist(), strict=True))

    together = tokens(list(range(len(kinds))))
    assert together == tokens(list(reversed(range(len(kinds)))))
    for alone in range(len(kinds)):
        assert tokens([alone])[alone] == together[alone]
    assert together[len(kinds) - 1] == scores[-1].argmax()


def test_the_graph_ready_way_draws_what_the_cpus_way_draws():
    torch.manual_seed(2)
    kinds = [replace(k, seed=seed) for seed, k in enumerate([*KINDS, Sampling()])]
    scores = torch.randn(len(kinds), 2000) * 3
    drawn = []
    for static in (False, True):
        processors = SamplingProcessors(static=static)
        storage = torch.zeros(processors.tensors_required, 16, dtype=torch.int32)
        args = processors.prepare_tensor_args(a_batch(kinds), storage)
        drawn.append(processors(None, scores.clone(), args).argmax(-1).tolist())
    assert drawn[0] == drawn[1]


def test_seeds_differ():
    assert len({sequence_seed(seed, choice) for seed in (0, 1, 2, "0", "1") for choice in range(50)}) == 250
    assert all(-(2**63) <= noise_key(seed, 5) < 2**63 for seed in (0, 2**64 - 1))
