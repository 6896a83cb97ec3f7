"""What the tests of static batching share: prompts, rows of one batch, and a model in which things happen."""

import asyncio
import contextlib
from dataclasses import replace

import pytest
from engine_harness import tokens_of

from rejoinder.worker.engines.transformers.penalties import Penalties
from rejoinder.worker.engines.transformers.sampling import Sampling

MARK = 77
"""The prompt with this token is the one that things happen to."""
ROWS = {"max_batch_tokens": None}


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
