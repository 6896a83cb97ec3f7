"""Penalties, min_p and tokens to stop at, with the tiny model: against transformers' own and a plain reference."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine_harness import completion, started, tokens_of
from transformers import AutoModelForCausalLM
from transformers.generation.continuous_batching.requests import RequestState

from rejoinder.worker.engines.transformers.penalties import History, Penalties, penalize
from rejoinder.worker.engines.transformers.sampling import Sampling, SamplingProcessors
from rejoinder.worker.errors import BadRequest

pytestmark = pytest.mark.asyncio(loop_scope="module")

PER_PAGE = 2 * 2 * 2 * 8 * 4 * 16  # both of K and V, layers, heads, size, bytes, tokens
PROMPT = [60, 70, 80, 60, 90]
LENGTH = 60
KINDS = [
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0},
    {"temperature": 0, "presence_penalty": 1.5},
    {"temperature": 1, "min_p": 0.1, "frequency_penalty": 0.4},
    {"temperature": 1.5, "min_p": 0.05, "top_p": 0.9},
    {"temperature": 0, "repetition_penalty": 0.8, "presence_penalty": 2, "frequency_penalty": -0.3},
    {"temperature": 2, "top_k": 50, "min_p": 0.02, "repetition_penalty": 2},
    {"temperature": 1},
]


@pytest.fixture(scope="module")
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


def reference(model, prompt, penalties, length):
    """Greedy, one token after the other, from the definitions alone."""
    generated = []
    for _ in range(length):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + generated])).logits[0, -1].tolist()
        for token in set(prompt + generated):
            logits[token] *= 1 / penalties.repetition if logits[token] > 0 else penalties.repetition
        for token in generated:
            logits[token] -= penalties.frequency
        for token in set(generated):
            logits[token] -= penalties.presence
        generated.append(max(range(len(logits)), key=logits.__getitem__))
        if generated[-1] == 1:
            break
    return generated


@pytest.mark.parametrize("repetition", [0.5, 0.9, 1.1, 1.5, 2.0])
async def test_the_repetition_penalty_is_transformers_own(engine, model, repetition):
    want = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        do_sample=False,
        repetition_penalty=repetition,
        max_new_tokens=LENGTH,
        pad_token_id=0,
    )[0, len(PROMPT) :].tolist()
    assert await tokens_of(engine._batch, PROMPT, LENGTH, Sampling(penalties=Penalties(repetition))) == want
    assert want != await tokens_of(engine._batch, PROMPT, LENGTH, Sampling())


@pytest.mark.parametrize(
    "penalties",
    [
        Penalties(presence=1.0),
        Penalties(presence=-2.0),
        Penalties(frequency=0.5),
        Penalties(frequency=-1.0),
        Penalties(presence=0.7, frequency=1.1),
        Penalties(repetition=1.2, presence=0.7, frequency=0.3),
    ],
    ids=str,
)
async def test_presence_and_frequency_are_as_defined(engine, model, penalties):
    want = reference(model, PROMPT, penalties, LENGTH)
    assert await tokens_of(engine._batch, PROMPT, LENGTH, Sampling(penalties=penalties)) == want


async def test_only_the_repetition_penalty_knows_the_prompt(engine, model):
    prompts = [[token, *PROMPT] for token in range(2, 290)]
    with torch.no_grad():
        likeliest = model(torch.tensor(prompts)).logits[:, -1].argmax(-1).tolist()
    repeating = [(prompt, token) for prompt, token in zip(prompts, likeliest, strict=True) if token in prompt]
    assert repeating
    changed = 0
    for prompt, token in repeating[:10]:
        assert await tokens_of(
            engine._batch, prompt, 1, Sampling(penalties=Penalties(presence=2.0, frequency=2.0))
        ) == [token]
        changed += await tokens_of(engine._batch, prompt, 1, Sampling(penalties=Penalties(2.0))) != [token]
    assert changed


def mixed(number, **body):
    return [
        completion({"prompt": f"fox {i} jumps" * (1 + i % 5), **body, **KINDS[i % len(KINDS)]}, f"mix-{i}")
        for i in range(number)
    ]


async def test_results_do_not_depend_on_the_batch(engine):
    requests = mixed(24, max_tokens=30)
    alone = [await engine.generate(request) for request in requests]
    for order in (requests, requests[::-1]):
        together = await asyncio.gather(*map(engine.generate, order))
        assert {body["id"]: body for body in together} == {body["id"]: body for body in alone}


async def test_results_do_not_depend_on_preemption(engine, tiny, monkeypatch):
    requests = mixed(16, prompt="lazy dog " * 6, max_tokens=100)
    want = await asyncio.gather(*map(engine.generate, requests))
    small = await started(tiny, cache_bytes=12 * PER_PAGE, max_model_len=160)
    try:
        preempted = []
        original = RequestState.create_equivalent_initial_request

        def noted(state):
            if state.generated_tokens and "history" in state.logit_processor_kwargs:
                preempted.append(state.logit_processor_kwargs["sampling"])
            return original(state)

        monkeypatch.setattr(RequestState, "create_equivalent_initial_request", noted)
        assert await asyncio.gather(*map(small.generate, requests)) == want
        assert len(set(preempted)) > 1
        assert len(preempted) > len(set(preempted)), "none was preempted twice"
    finally:
        await small.stop()


async def test_a_history_is_the_same_wherever_a_preemption_puts_the_border():
    prompt, generated = [5, 6, 5], [7, 5, 7, 8] * 60 + list(range(100, 300))
    for penalties, known in ((Penalties(1.5), {5, 6}), (Penalties(presence=1.0), set())):
        for border in (0, 1, 100, 240):
            history = History(prompt, penalties)
            for length in range(len(generated) + 1):
                moved = border if length >= border else 0
                history.update(prompt + generated[:moved], generated[moved:length])
            assert sorted(history.tokens.tolist()) == sorted(known | set(generated))
            have = dict(zip(history.tokens.tolist(), history.counts.tolist(), strict=True))
            assert have == {token: generated.count(token) for token in known | set(generated)}


async def test_penalties_stay_numbers_and_in_their_rows():
    history = History([0, 1, 2], Penalties(1e-300))
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, -1.0, 5.0, -torch.inf]])
    penalize(scores, [(1, Penalties(1e-300), history)])
    assert not scores.isnan().any()
    assert scores[0].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert scores[1].argmax() == 2


async def test_the_device_way_draws_what_the_cpus_way_draws():
    torch.manual_seed(3)
    drawn = []
    scores = torch.randn(len(KINDS), 2000) * 3
    for way in ("__call__", "_by_tensor"):
        processors = SamplingProcessors(static=False)
        args = processors.prepare_tensor_args(
            a_batch(), torch.zeros(processors.tensors_required, 16, dtype=torch.int32)
        )
        own = scores.clone()
        if way == "__call__":
            drawn.append(processors(None, own, args).argmax(-1).tolist())
        else:
            penalize(own, processors._penalized)
            drawn.append(processors._by_tensor(own, args).argmax(-1).tolist())
    assert drawn[0] == drawn[1]


def a_batch():
    requests = []
    for seed, kind in enumerate(KINDS):
        penalties = Penalties(
            kind.get("repetition_penalty", 1.0), kind.get("presence_penalty", 0.0), kind.get("frequency_penalty", 0.0)
        )
        sampling = Sampling(
            kind["temperature"], kind.get("top_k", 0), kind.get("top_p", 1.0), seed, kind.get("min_p", 0.0), penalties
        )
        kwargs = {"sampling": sampling}
        if penalties.active:
            kwargs["history"] = History([1, 2, 3], penalties)
        state = SimpleNamespace(
            logit_processor_kwargs=kwargs, position_offset=9, initial_tokens=[1, 2, 3], generated_tokens=[7, 8, 7]
        )
        requests.append(SimpleNamespace(has_new_token=True, state=state))
    return requests


@pytest.mark.parametrize("where", [0, 4, 9])
async def test_a_stop_token_ends_the_text_before_it(engine, where):
    whole = await tokens_of(engine._batch, PROMPT, 24, Sampling())
    first = whole.index(whole[where])
    asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": 24, "stop_token_ids": [289, whole[where]]}
    for extra in ({}, {"stop": ["never there"]}):
        body = await engine.generate(completion({**asked, **extra}))
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["choices"][0]["text"] == engine._text.decode(whole[:first])
        assert body["usage"]["completion_tokens"] == first + 1
    last = await engine.generate(completion({**asked, "max_tokens": first + 1}))
    assert last["choices"][0]["finish_reason"] == "stop"
    plain = await engine.generate(completion({**asked, "stop_token_ids": []}))
    assert plain["choices"][0]["text"] == engine._text.decode(whole)


async def test_a_stop_token_is_its_own_requests_alone(engine):
    whole = await tokens_of(engine._batch, PROMPT, 24, Sampling())
    ending, other = await asyncio.gather(
        tokens_of(engine._batch, PROMPT, 24, Sampling(), None, {whole[5]}),
        tokens_of(engine._batch, PROMPT, 24, Sampling()),
    )
    assert ending == whole[: whole.index(whole[5]) + 1]
    assert other == whole


async def test_refusals(engine, monkeypatch):
    body = {"prompt": PROMPT, "max_tokens": 4}
    with pytest.raises(BadRequest, match="0 to 289") as caught:
        await engine.generate(completion({**body, "stop_token_ids": [290]}))
    assert caught.value.param == "stop_token_ids"
    monkeypatch.setattr(engine, "_limits", replace(engine._limits, dynamic=False))
    with pytest.raises(BadRequest, match="frequency_penalty is not supported by this worker"):
        await engine.generate(completion({**body, "frequency_penalty": 0.1}))


@pytest.mark.parametrize(
    ("static", "ahead", "penalties"), [(False, False, True), (True, False, False), (False, True, False)]
)
async def test_steps_that_cannot_know_all_tokens_before_them_take_no_penalties(static, ahead, penalties):
    from rejoinder.worker.engines.transformers.continuous import _sees_history

    config = SimpleNamespace(use_async_batching=ahead)
    manager = SimpleNamespace(logit_processor=SamplingProcessors(static=static), continuous_batching_config=config)
    assert _sees_history(manager) is penalties
