"""Static batching: the same tokens as elsewhere, and rows that end when they end."""

import asyncio
import copy
import json
import shutil
import threading

import pytest
import torch
from engine_harness import KINDS, chat, completion, eventually, started, tokens_of
from static_harness import MARK, PET, alone, at_once, following, hooked, marked, prompts, same, together
from transformers import GenerationConfig

from rejoinder.worker.engines.transformers.penalties import Penalties
from rejoinder.worker.engines.transformers.sampling import Sampling
from rejoinder.worker.errors import Failed

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_the_same_text_as_by_continuous_batching(engine, models):
    static = await started(models["llama"], batching="static")
    more = [
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 1, "frequency_penalty": 1.5, "presence_penalty": -0.5},
        {"temperature": 0.8, "stop": ["a", "ox"]},
        {"temperature": 1, "stop_token_ids": [20, 30, 40, 50, 60]},
    ]
    bodies = [
        {"prompt": f"fox {i} jumps" * (1 + i % 5), "max_tokens": 8 + 5 * (i % 4), "n": 1 + i % 2, **what}
        for i, what in enumerate((KINDS + more) * 3)
    ]
    requests = [completion(body, f"same-{i}") for i, body in enumerate(bodies)]
    want = await asyncio.gather(*map(engine.generate, requests))
    assert await asyncio.gather(*map(static.generate, requests)) == want
    await static.stop()


def apart(bodies):
    """The answers without their log-probabilities, and those alone."""
    bodies = copy.deepcopy(bodies)
    told = [choice.pop("logprobs") for body in bodies for choice in body["choices"]]
    return bodies, [[one["logprob"] for one in known["content"]] for known in told if known]


async def test_the_same_log_probabilities_and_json_as_by_continuous_batching(engine, models):
    static = await started(models["llama"], batching="static")
    schema = {"type": "json_schema", "json_schema": {"name": "pet", "schema": PET}}
    requests = [
        chat(
            {
                "messages": [{"role": "user", "content": f"fox {i} jumps" * (1 + i % 4)}],
                "max_tokens": 80,
                **what,
                **({"logprobs": True, "top_logprobs": i % 4} if i % 3 else {}),
                **({"response_format": schema} if i % 2 else {}),
            },
            f"told-{i}",
        )
        for i, what in enumerate((KINDS + [{"temperature": 0, "repetition_penalty": 1.3}]) * 3)
    ]
    want, want_told = apart(await asyncio.gather(*map(engine.generate, requests)))
    got, told = apart(await asyncio.gather(*map(static.generate, requests)))
    await static.stop()
    assert got == want
    assert len(told) == 14
    for here, there in zip(told, want_told, strict=True):
        assert here == pytest.approx(there, abs=1e-4)
    for body in got[1::2]:
        assert set(json.loads(body["choices"][0]["message"]["content"])) == {"kind", "age"}


async def test_log_probabilities_are_the_models_own(static):
    model = static._batch._model
    for i, prompt in enumerate(prompts(3)):
        done = await static._batch.run(prompt, 20, await following(static, i))
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                logits = model(torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *done.tokens]])).logits
                raw = logits[0, :-1].log_softmax(-1)
            else:
                raw = model(torch.tensor([[*prompt, *done.tokens]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for token, known, row in zip(done.tokens, done.logprobs, raw, strict=True):
            assert known.logprob == pytest.approx(float(row[token]), abs=2e-4)
            values = [value for _, value in known.top]
            assert values == pytest.approx(row.topk(len(known.top)).values.tolist(), abs=2e-4)


async def test_what_follows_a_row_does_not_depend_on_its_neighbours(static):
    ways = [await following(static, i) for i in range(8)]
    want = [await static._batch.run(prompt, 60, way) for prompt, way in zip(prompts(), ways, strict=True)]
    calls = [static._batch.run(prompt, 60, way) for prompt, way in zip(prompts(), ways, strict=True)]
    same(await asyncio.gather(*await at_once(static, *calls)), want)
    for one, way in zip(want, ways, strict=True):
        if way.grammar is not None:
            assert set(json.loads(static._text.decode(one.tokens))) == {"kind", "age"}


@pytest.mark.parametrize("at", [1, 2, 9])
async def test_a_batch_that_is_run_again_takes_no_token_twice(static, at):
    ways = [await following(static, i) for i in range(6)]
    want = [await static._batch.run(prompt, 40, way) for prompt, way in zip(prompts(6), ways, strict=True)]

    def fails(rows, step, output):
        if step == at:
            raise RuntimeError("an index is out of bounds")

    with marked(static, fails):
        calls = [static._batch.run(prompt, 40, way) for prompt, way in zip(prompts(6), ways, strict=True)]
        guilty, *others = await at_once(static, tokens_of(static._batch, [MARK, 5, 6], 20, Sampling()), *calls)
        with pytest.raises(Failed):
            await guilty
        same(await asyncio.gather(*others), want)


async def test_a_translation_does_not_say_what_its_model_must_not(models, tmp_path):
    shutil.copytree(models["t5"], tmp_path, dirs_exist_ok=True)
    engine = await started(models["t5"])
    said = await tokens_of(engine._batch, [5, 6, 7], 20, Sampling())
    await engine.stop()
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "bad_words_ids": [[said[0]]]}))
    engine = await started(tmp_path)
    assert said[0] not in await tokens_of(engine._batch, [5, 6, 7], 20, Sampling())
    await engine.stop()


async def test_rows_do_not_depend_on_their_neighbours(static):
    want = await alone(static, prompts())
    before = static._batch.steps
    assert await together(static, prompts()) == want
    assert static._batch.steps - before == 20, "one batch"


@pytest.mark.parametrize("penalty", [1.0, 1.5])
async def test_greedy_is_what_generate_says(static, penalty):
    model, prompt = static._batch._model, [5, 6, 7, 8]
    config = GenerationConfig(
        max_new_tokens=20,
        eos_token_id=1,
        pad_token_id=0,
        repetition_penalty=penalty,
        decoder_start_token_id=0,
    )
    mask = torch.ones(1, 4, dtype=torch.int64)
    out = model.generate(torch.tensor([prompt]), attention_mask=mask, generation_config=config)[0].tolist()
    want = out[1:] if model.config.is_encoder_decoder else out[4:]
    assert await tokens_of(static._batch, prompt, 20, Sampling(penalties=Penalties(repetition=penalty))) == want


async def test_a_short_row_is_answered_before_the_long_ones_end(static):
    before, answered = static._batch.steps, threading.Event()

    def waits(_module, _arguments, _output):
        if static._batch.steps - before == 20:
            assert answered.wait(60)

    with hooked(static._batch._model.get_output_embeddings(), waits):
        long, short = await at_once(
            static,
            tokens_of(static._batch, [5] * 4, 40, Sampling(temperature=1.0)),
            tokens_of(static._batch, [6] * 4, 3, Sampling()),
        )
        assert len(await short) == 3
        assert not long.done()
        answered.set()
        assert len(await long) == 40
    assert static._batch.steps - before == 40, "one batch"


async def test_each_row_ends_by_its_own_rules(static):
    whole = await tokens_of(static._batch, [9, 8, 7], 20, Sampling())
    calls = []

    def stop(tokens):
        calls.append(list(tokens))
        return len(tokens) == 4

    stopped, ended, free = await asyncio.gather(
        tokens_of(static._batch, [9, 8, 7], 20, Sampling(), stop),
        tokens_of(static._batch, [9, 8, 7], 20, Sampling(), None, {whole[6]}),
        tokens_of(static._batch, [9, 8, 7], 20, Sampling()),
    )
    assert stopped == whole[:4]
    assert calls == [whole[:n] for n in range(1, 5)]
    assert ended == whole[: whole.index(whole[6]) + 1]
    assert free == whole


async def test_a_batch_ends_when_its_last_row_is_cancelled(static):
    before = static._batch.steps
    calls = await at_once(static, *[tokens_of(static._batch, [5] * 4, 200, Sampling()) for _ in range(3)])
    await eventually(lambda: static._batch.steps > before)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    assert len(await tokens_of(static._batch, [5] * 4, 2, Sampling())) == 2
    assert static._batch.steps - before < 200
    assert not static._batch._rows
    assert not static._batch._waiting
