"""Static batching: failures that are one row's own, limits, and models that batch in a way of their own."""

import asyncio

import pytest
import torch
from engine_harness import CONTEXT, GREEDY, completion, eventually, started, tokens_of
from static_harness import MARK, ROWS, alone, at_once, hooked, kind, marked, prompts, runs, together

from rejoinder.worker.engines.transformers.probe import Together, rows_together
from rejoinder.worker.engines.transformers.sampling import Sampling
from rejoinder.worker.engines.transformers.static import StaticBatch
from rejoinder.worker.errors import BadRequest, EngineGone, Failed, RequestTooLarge, Unavailable

pytestmark = pytest.mark.asyncio(loop_scope="module")


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
    async with asyncio.timeout(60):
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
