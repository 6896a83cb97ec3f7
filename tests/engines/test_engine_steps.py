"""How steps are made: compiled, warmed up, and what of it a CPU or an attention cannot do."""

import asyncio
import threading

import pytest
import torch
from engine_harness import SMALL, completion, started, tokens_of

from rejoinder.worker.engines.transformers.continuous import ContinuousBatch
from rejoinder.worker.engines.transformers.engine import TransformersEngine
from rejoinder.worker.engines.transformers.loading import load
from rejoinder.worker.engines.transformers.sampling import Sampling
from rejoinder.worker.engines.transformers.settings import TransformersSettings
from rejoinder.worker.errors import EngineGone


def settings(model, **config):
    return TransformersSettings(model=str(model), **{**SMALL, **config})


def generated(batch):
    """Greedy and sampled sequences of several lengths, together."""

    async def together():
        kinds = [Sampling(), Sampling(temperature=0.8, seed=1), Sampling(temperature=1.2, top_k=9, top_p=0.7, seed=2)]
        return await asyncio.gather(*[tokens_of(batch, [5, 6, 7] * (n + 1), 20, kinds[n % 3]) for n in range(9)])

    batch.start()
    try:
        return asyncio.run(together())
    finally:
        batch.stop()


@pytest.mark.model  # compiling takes a minute
def test_compiled_steps_say_the_same(tiny):
    plain = ContinuousBatch(load(settings(tiny, attn="sdpa")), settings(tiny, attn="sdpa"))
    compiled = ContinuousBatch(load(settings(tiny)), settings(tiny, compile="default"))
    assert compiled._manager.continuous_batching_config.varlen_compile_config.dynamic
    assert (plain.dynamic, compiled.dynamic) == (True, False)
    assert generated(compiled) == generated(plain)


def test_where_nothing_would_be_compiled_it_says_so(tiny):
    config = settings(tiny, compile="max", attn="varlen")
    with pytest.raises(EngineGone, match="compile is max, but with attn varlen no step is compiled: set attn to sdpa"):
        ContinuousBatch(load(config), config)


def test_flash_needs_its_package_and_a_gpu(tiny):
    loaded = load(settings(tiny))
    with pytest.raises(EngineGone, match=r"attn is flash, but .*bfloat16 or float16"):
        ContinuousBatch(loaded, settings(tiny, attn="flash"))


@pytest.mark.parametrize(
    ("kind", "config", "why"),
    [
        ((torch.float32, (9, 0)), {}, "needs dtype bfloat16 or float16"),
        ((torch.bfloat16, (7, 5)), {}, "needs compute capability 8.0, where this GPU has 7.5"),
        ((torch.bfloat16, (8, 0)), {"head_dim": 12}, "its heads have 12 dimensions"),
        ((torch.float16, (8, 0)), {"head_dim": 512}, "its heads have 512 dimensions"),
        ((torch.float16, (8, 0)), {"v_head_dim": 4}, "values are of another size"),
        ((torch.bfloat16, (9, 0)), {}, None),
    ],
)
def test_what_pytorchs_kernel_refuses(tiny, monkeypatch, kind, config, why):
    """The checks alone: there is no GPU here that would run it."""
    from rejoinder.worker.engines.transformers.attention import _why_no_kernel

    dtype, capability = kind
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    model = load(settings(tiny)).model.to(dtype)
    for name, value in config.items():
        setattr(model.config, name, value)
    said = _why_no_kernel(model, model.config)
    assert said is None if why is None else why in said


@pytest.mark.parametrize("warmup", [True, False])
async def test_warmed_up_it_has_made_steps_before_it_is_ready(tiny, warmup):
    engine = await started(tiny, warmup=warmup)
    try:
        assert (engine._batch.steps > 0) == warmup
        first = await engine.generate(completion({"prompt": "the quick", "max_tokens": 9, "seed": 3}))
    finally:
        await engine.stop()
    assert first["usage"]["completion_tokens"] == 9


async def test_a_model_of_two_positions_warms_up(tiny):
    engine = await started(tiny, max_model_len=2, warmup=True)
    try:
        result = await engine.generate(completion({"prompt": [5], "max_tokens": 1}))
    finally:
        await engine.stop()
    assert result["usage"]["total_tokens"] == 2


async def test_what_cannot_warm_up_does_not_start_and_leaves_no_thread(tiny, monkeypatch):
    before = set(threading.enumerate())
    engine = TransformersEngine(settings(tiny, warmup=True))
    original = engine._load

    def broken():
        original()
        engine._batch._manager.model.lm_head = None

    monkeypatch.setattr(engine, "_load", broken)
    with pytest.raises(EngineGone, match="does not generate: "):
        await engine.start()
    await engine.stop()
    names = [thread.name for thread in set(threading.enumerate()) - before]
    assert not [name for name in names if not name.startswith(("asyncio_", "tqdm"))], names


async def test_cancelling_the_start_ends_the_thread(tiny, monkeypatch):
    engine = TransformersEngine(settings(tiny, warmup=True))
    reached, alive = asyncio.Event(), []

    async def endless():
        alive.append(engine._batch.alive)
        reached.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(engine, "_warm_up", endless)
    starting = asyncio.create_task(engine.start())
    await reached.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert alive == [True]
    assert not engine._batch.alive
    assert engine.capacity == 0
    await engine.stop()
