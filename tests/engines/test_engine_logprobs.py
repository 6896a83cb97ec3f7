"""Log-probabilities: the model's own, at the right places, in OpenAI's shapes, for those who ask alone."""

import asyncio
import math
from dataclasses import replace

import pytest
import torch
from engine_harness import KINDS, chat, completion, started
from openai.types import Completion
from openai.types.chat import ChatCompletion
from transformers import AutoModelForCausalLM
from transformers.generation.continuous_batching.requests import RequestState

from rejoinder.worker.engines.transformers.penalties import Penalties
from rejoinder.worker.engines.transformers.sampling import Sampling
from rejoinder.worker.errors import BadRequest

pytestmark = pytest.mark.asyncio(loop_scope="module")

PER_PAGE = 2 * 2 * 2 * 8 * 4 * 16  # both of K and V, layers, heads, size, bytes, tokens
PROMPT = [60, 70, 80, 60, 90]


@pytest.fixture(scope="module")
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


def reference(model, prompt, tokens):
    """log_softmax of a plain forward at each generated token's place, [T, V]."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def check(generated, want, alternatives):
    assert len(generated.logprobs) == len(generated.tokens)
    for token, known, row in zip(generated.tokens, generated.logprobs, want, strict=True):
        assert known.logprob == pytest.approx(float(row[token]), abs=2e-4)
        assert [value for _, value in known.top] == pytest.approx(row.topk(alternatives).values.tolist(), abs=2e-4)
        assert [value for _, value in known.top] == pytest.approx([float(row[i]) for i, _ in known.top], abs=2e-4)
        assert len({i for i, _ in known.top}) == alternatives


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5, seed=3),
        Sampling(temperature=2.0, top_p=0.9, seed=4),
        Sampling(temperature=1.5, top_k=9, min_p=0.01, seed=5),
        Sampling(penalties=Penalties(1.7, 1.5, 1.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("alternatives", [0, 1, 20])
async def test_they_are_the_raw_distributions(engine, model, sampling, alternatives):
    generated = await engine._batch.run(PROMPT, 60, replace(sampling, logprobs=alternatives))
    assert generated.tokens == (await engine._batch.run(PROMPT, 60, sampling)).tokens
    check(generated, reference(model, PROMPT, generated.tokens), alternatives)


def mixed(number, **body):
    """Three of four ask; each kind of sampling comes with and without."""
    return [
        completion(
            {
                "prompt": f"fox {i} jumps" * (1 + i % 5),
                **body,
                **KINDS[i // 4 % len(KINDS)],
                **({"logprobs": (0, 3, 20)[i % 3]} if i % 4 else {}),
            },
            f"mix-{i}",
        )
        for i in range(number)
    ]


def assert_close(one, two):
    assert {**one, "choices": None} == {**two, "choices": None}
    for a, b in zip(one["choices"], two["choices"], strict=True):
        assert (a["text"], a["finish_reason"]) == (b["text"], b["finish_reason"])
        if a["logprobs"] is None or b["logprobs"] is None:
            assert a["logprobs"] is b["logprobs"] is None
            continue
        assert a["logprobs"]["tokens"] == b["logprobs"]["tokens"]
        assert a["logprobs"]["text_offset"] == b["logprobs"]["text_offset"]
        assert a["logprobs"]["token_logprobs"] == pytest.approx(b["logprobs"]["token_logprobs"], abs=1e-3)
        for x, y in zip(a["logprobs"]["top_logprobs"], b["logprobs"]["top_logprobs"], strict=True):
            assert sorted(x.values()) == pytest.approx(sorted(y.values()), abs=1e-3)


async def test_they_do_not_depend_on_the_batch(engine):
    requests = mixed(24, max_tokens=30)
    alone = [await engine.generate(request) for request in requests]
    for one, two in zip(alone, await asyncio.gather(*map(engine.generate, requests)), strict=True):
        assert_close(one, two)
        Completion.model_validate(one)


async def test_who_asks_changes_nobodys_text(engine):
    requests = mixed(24, max_tokens=30)
    plain = [replace(r, body={k: v for k, v in r.body.items() if k != "logprobs"}) for r in requests]
    texts = [body["choices"][0]["text"] for body in await asyncio.gather(*map(engine.generate, plain))]
    assert [body["choices"][0]["text"] for body in await asyncio.gather(*map(engine.generate, requests))] == texts


async def test_a_preemption_loses_none(engine, tiny, monkeypatch):
    requests = mixed(16, prompt="lazy dog " * 6, max_tokens=100)
    want = await asyncio.gather(*map(engine.generate, requests))
    small = await started(tiny, cache_bytes=12 * PER_PAGE, max_model_len=160)
    try:
        preempted = []
        original = RequestState.create_equivalent_initial_request

        def noted(state):
            if state.generated_tokens and "record" in state.logit_processor_kwargs:
                preempted.append(state.request_id)
            return original(state)

        monkeypatch.setattr(RequestState, "create_equivalent_initial_request", noted)
        for one, two in zip(want, await asyncio.gather(*map(small.generate, requests)), strict=True):
            assert_close(one, two)
        assert len(preempted) > len(set(preempted)) > 1, "none was preempted twice"
    finally:
        await small.stop()


async def test_the_shape_of_a_chat(engine):
    body = {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 40, "seed": 1}
    plain = ChatCompletion.model_validate(await engine.generate(chat(body)))
    assert plain.choices[0].logprobs is None
    for alternatives in (None, 0, 4):
        asked = {**body, "logprobs": True, "n": 2, "temperature": 2}
        if alternatives is not None:
            asked["top_logprobs"] = alternatives
        answer = ChatCompletion.model_validate(await engine.generate(chat(asked)), strict=True)
        for choice in answer.choices:
            content = choice.logprobs.content
            assert (
                b"".join(bytes(one.bytes or []) for one in content).decode(errors="replace") == choice.message.content
            )
            for one in content:
                assert len(one.top_logprobs) == (alternatives or 0)
                assert one.logprob <= 0
                ranked = [other.logprob for other in one.top_logprobs]
                assert ranked == sorted(ranked, reverse=True)
                for other in [one, *one.top_logprobs]:
                    if other.bytes is not None and "\\x" not in other.token:
                        assert bytes(other.bytes).decode() == other.token


async def test_the_shape_of_a_completion(engine):
    for alternatives in (0, 5, 20):
        body = {"prompt": ["fox", "dog"], "max_tokens": 40, "temperature": 2, "seed": 5, "logprobs": alternatives}
        for choice in Completion.model_validate(await engine.generate(completion(body)), strict=True).choices:
            told = choice.logprobs
            assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
            for token, logprob, top, offset in zip(
                told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset, strict=True
            ):
                assert top[token] == logprob
                assert max(1, alternatives) <= len(top) <= alternatives + 1
                if "\\x" not in token and token not in {"<s>", "</s>"}:
                    assert choice.text[offset:].startswith(token)


async def test_the_token_that_ends_is_not_told(engine):
    whole = await engine._batch.run(PROMPT, 24, Sampling())
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "logprobs": 0, "stop_token_ids": [whole.tokens[5]]}
    answer = await engine.generate(completion(body))
    count = whole.tokens.index(whole.tokens[5])
    assert answer["usage"]["completion_tokens"] == count + 1
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == count


async def test_they_cover_the_text_before_a_stop_string(engine):
    body = {"prompt": "the quick", "max_tokens": 40, "temperature": 0, "logprobs": 2}
    whole = (await engine.generate(completion(body)))["choices"][0]
    for begin in range(1, 12):
        stop = whole["text"][begin : begin + 3]
        choice = (await engine.generate(completion({**body, "stop": stop})))["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert whole["text"].startswith(choice["text"])
        told = choice["logprobs"]
        assert all(offset < len(choice["text"]) for offset in told["text_offset"])
        following = whole["logprobs"]["text_offset"][len(told["tokens"])]
        assert following >= len(choice["text"])
        assert told["tokens"] == whole["logprobs"]["tokens"][: len(told["tokens"])]


async def test_what_is_minus_infinity_is_told_as_openai_does(engine):
    from rejoinder.worker.engines.answers import Candidate, Choice, Place, chat_completion

    place = Place(Candidate("a", -math.inf, b"a"), 0, [Candidate("b", math.nan, b"b")])
    request = chat({"messages": []})
    (choice,) = chat_completion(request, "m", 1, [Choice("a", "stop", 1, [place])])["choices"]
    (content,) = choice["logprobs"]["content"]
    assert (content["logprob"], content["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)


async def test_refusals(engine, monkeypatch):
    messages = {"messages": [{"role": "user", "content": "x"}]}
    for request, param in (
        (completion({"prompt": "x", "logprobs": 21}), "logprobs"),
        (completion({"prompt": "x", "logprobs": True}), "logprobs"),
        (chat({**messages, "logprobs": 1}), "logprobs"),
        (chat({**messages, "logprobs": True, "top_logprobs": 21}), "top_logprobs"),
        (chat({**messages, "top_logprobs": 2}), "top_logprobs"),
        (chat({**messages, "logprobs": False, "top_logprobs": 2}), "top_logprobs"),
        (completion({"prompt": "x", "logprobs": 1, "echo": True}), "echo"),
    ):
        with pytest.raises(BadRequest) as caught:
            await engine.generate(request)
        assert caught.value.param == param
    monkeypatch.setattr(engine, "_limits", replace(engine._limits, dynamic=False))
    for request in (completion({"prompt": "x", "logprobs": 0}), chat({**messages, "logprobs": True})):
        with pytest.raises(BadRequest, match="CUDA graphs") as caught:
            await engine.generate(request)
        assert caught.value.param == "logprobs"
    assert await engine.generate(chat({**messages, "logprobs": False, "max_tokens": 2}))
