"""Static batching: the same tokens as elsewhere, rows that end when they end, and failures that are one row's own."""

import asyncio
import contextlib
import copy
import json
import shutil
from dataclasses import replace

import pytest
import pytest_asyncio
import torch
from engine_harness import CONTEXT, GREEDY, KINDS, build_tiny, chat, completion, eventually, started, tokens_of
from transformers import GenerationConfig

from rejoinder.worker.engines.transformers.penalties import Penalties
from rejoinder.worker.engines.transformers.probe import Together, rows_together
from rejoinder.worker.engines.transformers.sampling import Sampling
from rejoinder.worker.engines.transformers.static import StaticBatch
from rejoinder.worker.errors import BadRequest, EngineGone, Failed, RequestTooLarge, Unavailable

pytestmark = pytest.mark.asyncio(loop_scope="module")

MARK = 77
"""The prompt with this token is the one that things happen to."""
ROWS = {"max_batch_tokens": None}


@pytest.fixture(scope="session")
def models(tmp_path_factory, tiny):
    others = {family: build_tiny(tmp_path_factory.mktemp(family), family=family) for family in ("t5", "mamba")}
    return {"llama": tiny, **others}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["llama", "t5", "mamba"])
async def static(request, models):
    engine = await started(models[request.param], batching="static" if request.param == "llama" else "auto", **ROWS)
    assert isinstance(engine._batch, StaticBatch)
    yield engine
    await engine.stop()


def prompts(count=8):
    return [[5 + (7 * i + k) % 60 for k in range(3 + 2 * i)] for i in range(count)]


def kind(i):
    penalties = Penalties(repetition=1.4, presence=0.3, frequency=0.2) if i % 2 else Penalties()
    return Sampling(temperature=(0, 1.0, 0.7)[i % 3], top_k=(0, 0, 12)[i % 3], seed=i, penalties=penalties)


async def at_once(engine, *calls):
    """Start calls of `Batch.run` so that the generation thread sees all of them or none."""
    with engine._batch._changed:  # re-entered by the calls, which run in this thread
        tasks = [asyncio.create_task(call) for call in calls]
        await asyncio.sleep(0)
    return tasks


def runs(engine, prompts, length=20):
    return [tokens_of(engine._batch, p, length, kind(i)) for i, p in enumerate(prompts)]


async def alone(engine, prompts):
    return [await run for run in runs(engine, prompts)]


async def together(engine, prompts):
    return await asyncio.gather(*await at_once(engine, *runs(engine, prompts)))


PET = {
    "type": "object",
    "properties": {"kind": {"enum": ["fox", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}


async def following(engine, i):
    """Sampling that follows its sequence in each way that there is: every row by its history, most by more."""
    grammar = await engine._grammars.compiled(PET) if i % 3 else None
    return replace(kind(i), penalties=Penalties(1.2, 0.3, 0.2), logprobs=(0, 3, 5)[i % 3], grammar=grammar)


def same(got, want):
    assert [one.tokens for one in got] == [one.tokens for one in want]
    for one, other in zip(got, want, strict=True):
        assert len(one.logprobs) == len(one.tokens)
        for here, there in zip(one.logprobs, other.logprobs, strict=True):
            assert here.logprob == pytest.approx(there.logprob, abs=1e-4)
            assert [value for _, value in here.top] == pytest.approx([value for _, value in there.top], abs=1e-4)


@contextlib.contextmanager
def hooked(module, hook):
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def marked(engine, happens):
    """Call `happens(rows, step, module's output)` at each step of a batch that has marked rows."""
    model, rows, step = engine._batch._model, [], 0

    def sees(_, arguments, output):
        nonlocal rows, step
        ids = arguments[0]
        if ids.size(1) > 1:  # prompts; the decoder of an encoder-decoder begins with one token
            rows, step = (ids == MARK).any(1).nonzero().flatten().tolist(), 0

    def computes(_, arguments, output):
        nonlocal step
        step += 1
        return happens(rows, step, output) if rows else None

    reader = model.get_encoder() if model.config.is_encoder_decoder else model
    stack = contextlib.ExitStack()
    stack.enter_context(hooked(reader.get_input_embeddings(), sees))
    stack.enter_context(hooked(model.get_output_embeddings(), computes))
    return stack


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
    before = static._batch.steps
    long, short = await at_once(
        static,
        tokens_of(static._batch, [5] * 4, 40, Sampling(temperature=1.0)),
        tokens_of(static._batch, [6] * 4, 3, Sampling()),
    )
    assert len(await short) == 3
    assert not long.done()
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


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), Unavailable),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), Unavailable),
        (RuntimeError("an index is out of bounds"), Failed),
    ],
)
@pytest.mark.parametrize("at", [1, 7])
async def test_a_failing_batch_is_run_in_halves_down_to_the_guilty_row(static, error, becomes, at):
    good = prompts(6)
    want = await alone(static, good)
    seen = []

    def stop(tokens):
        seen.append(list(tokens))
        return False

    def fails(rows, step, output):
        if step == at:
            raise error

    with marked(static, fails):
        guilty, watched, *calls = await at_once(
            static,
            tokens_of(static._batch, [MARK, 5, 6], 20, Sampling()),
            tokens_of(static._batch, good[0], 20, kind(0), stop),
            *runs(static, good),
        )
        with pytest.raises(becomes):
            await guilty
        assert await asyncio.gather(*calls) == want
        assert await watched == want[0]
    assert seen == [want[0][:n] for n in range(1, len(want[0]) + 1)], "each token was told once"
    assert static._batch.alive


async def test_memory_for_half_a_batch_is_enough(static):
    want = await alone(static, prompts())

    def fails(_, arguments, output):
        if arguments[0].size(0) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with hooked(static._batch._model.get_output_embeddings(), fails):
        assert await together(static, prompts()) == want


@pytest.mark.parametrize(
    ("value", "at", "how"),
    [
        (float("nan"), 1, Sampling()),
        (float("nan"), 5, Sampling(temperature=1.0, top_p=0.5)),
        (float("-inf"), 5, Sampling(temperature=1.0, top_k=3)),
        (float("inf"), 5, Sampling(temperature=1.0)),
    ],
)
async def test_logits_that_are_no_numbers_are_one_rows_failure(static, value, at, how):
    good = prompts(5)
    want = await alone(static, good)

    def breaks(rows, step, output):
        if step == at:
            output = output.clone()
            output[rows] = value
        return output

    before = static._batch.steps
    with marked(static, breaks):
        guilty, *calls = await at_once(static, tokens_of(static._batch, [MARK, 5, 6], 20, how), *runs(static, good))
        with pytest.raises(Failed, match="no number"):
            await guilty
        assert await asyncio.gather(*calls) == want
    assert static._batch.steps - before == max(map(len, want)), "nothing was run again"


async def test_the_limits_of_an_encoder_decoder_are_for_prompt_and_answer_each(models):
    engine = await started(models["t5"])
    whole = {"prompt": [5] * CONTEXT, "max_tokens": CONTEXT, "temperature": 0}
    body = await engine.generate(completion(whole))
    assert body["usage"]["prompt_tokens"] == CONTEXT
    assert 1 <= body["usage"]["completion_tokens"] <= CONTEXT
    with pytest.raises(RequestTooLarge, match=f"at most {CONTEXT} tokens are allowed"):
        await engine.generate(completion({**whole, "prompt": [5] * (CONTEXT + 1)}))
    with pytest.raises(BadRequest, match="max_tokens"):
        await engine.generate(completion({**whole, "max_tokens": CONTEXT + 1}))
    await engine.stop()


async def test_what_is_generated_of_a_t5_depends_on_its_prompt(models):
    engine = await started(models["t5"])
    batch = engine._batch
    texts = await asyncio.gather(*[tokens_of(batch, p, 20, Sampling(temperature=1.0, seed=1)) for p in prompts()])
    assert len(set(map(tuple, texts))) > 1
    await engine.stop()


async def test_the_end_of_the_thread_is_everybodys(models):
    engine = await started(models["mamba"])
    call = asyncio.create_task(engine.generate(completion({**GREEDY, "max_tokens": 200})))
    await eventually(lambda: engine._batch.steps)
    engine._batch._bounds = None  # what is wrong in this package is nobody's own failure
    late = asyncio.create_task(engine.generate(completion(GREEDY)))
    await call
    with pytest.raises(Unavailable):
        await late
    async with asyncio.timeout(5):
        await engine.wait_gone()
    assert engine.capacity == 0
    with pytest.raises(Unavailable):
        await engine.generate(completion(GREEDY))
    await engine.stop()


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("t5", {"batching": "continuous"}, "is an encoder-decoder: set batching to auto"),
        ("mamba", {"batching": "continuous"}, "keeps a state .*: set batching to auto"),
        ("llama", {"batching": "static", "attn": "varlen"}, "only continuous batching has"),
        ("llama", {"batching": "static", "cache_bytes": 100}, "less than two tokens"),
        ("mamba", {"compile": "default"}, "keeps a state .* runs by static batching, but compile is set"),
        ("t5", {"compile": "max"}, "is an encoder-decoder, so it runs by static batching, but compile is set"),
    ],
)
async def test_what_cannot_be_batched_so_is_said(models, family, config, message):
    with pytest.raises(EngineGone, match=message):
        await started(models[family], **config)


async def test_a_model_that_continuous_batching_refuses_runs_by_static(models, monkeypatch, caplog):
    from transformers import MambaForCausalLM

    monkeypatch.setattr(MambaForCausalLM, "_is_stateful", False)
    engine = await started(models["mamba"], max_model_len=100)
    assert isinstance(engine._batch, StaticBatch)
    assert "continuous batching cannot serve" in caplog.text
    assert "it runs by static batching" in caplog.text
    await engine.stop()


async def test_a_model_that_ignores_padding_gets_none(models, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def blind(self, *args, attention_mask=None, position_ids=None, **kwargs):
        return forward(self, *args, **kwargs)

    engine = await started(models["llama"], batching="static", **ROWS)
    wanted = prompts(3) * 2
    want = await alone(engine, wanted)
    assert rows_together(engine._batch._model) is Together.PADDED
    await engine.stop()
    monkeypatch.setattr(LlamaForCausalLM, "forward", blind)
    engine = await started(models["llama"], batching="static", **ROWS)
    assert not engine._batch._bounds.padding
    before = engine._batch.steps
    assert await together(engine, wanted) == want
    assert engine._batch.steps - before == 60, "those of one length ran together"
    await engine.stop()


async def test_a_model_whose_rows_mix_runs_one_at_a_time(models, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def mixing(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits + 3 * (out.logits.roll(1, 0) - out.logits)
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", mixing)
    engine = await started(models["llama"], batching="static", **ROWS)
    want = await alone(engine, prompts(4))
    assert await together(engine, prompts(4)) == want
    await engine.stop()
