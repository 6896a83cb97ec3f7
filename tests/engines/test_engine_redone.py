"""A step that is made again leaves penalties, grammars and log-probabilities as if it had been made once."""

import asyncio
from dataclasses import replace
from itertools import count

import pytest
import torch
from engine_harness import started
from neighbours_harness import PER_PAGE, nothing_left, sampling, together
from transformers.generation.continuous_batching.requests import RequestState

from rejoinder.worker.engines.transformers.penalties import Penalties
from rejoinder.worker.engines.transformers.sampling import Sampling
from rejoinder.worker.errors import Failed

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["fox", "dog"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 2, "maxItems": 4},
    },
    "required": ["kind", "tags"],
    "additionalProperties": False,
}


async def mixed(engine, number):
    """Each of the three with and without the others, behind prompts shorter and longer than a step."""
    grammar = await engine._grammars.compiled(SCHEMA)
    return [
        (
            [3 + (7 * i + j) % 200 for j in range(1 + (i * 31) % 90)],
            40,
            replace(
                sampling(i),
                logprobs=i % 4 if i & 1 else None,
                grammar=grammar if i & 2 else None,
                penalties=Penalties(1.3, 0.5, 0.4) if i & 4 else Penalties(),
            ),
        )
        for i in range(number)
    ]


async def told(engine, wanted):
    """Tokens, how many places are known of each sequence, and the log-probabilities of all."""
    results = await together(engine._batch, wanted)
    places = [place for result in results for place in result.logprobs or ()]
    lengths = [None if result.logprobs is None else len(result.logprobs) for result in results]
    values = [value for place in places for value in (place.logprob, *[logprob for _, logprob in place.top])]
    return ([result.tokens for result in results], lengths), values


def assert_same(one, two):
    """The last digits of log-probabilities depend on a float's rounding in another batch."""
    assert one[0] == two[0]
    assert one[1] == pytest.approx(two[1], abs=1e-3)


def failing_after_drawing(engine, when):
    """All of a step is done, then it fails: records are written, matchers and histories have moved on."""
    runner, raised = engine._batch._manager.batch_processor.model_runner, []
    original = runner._sample

    def sample(scores, output_ids):
        original(scores, output_ids)
        if when(scores.shape[1]):
            raised.append(scores.shape[1])
            raise torch.OutOfMemoryError("CUDA out of memory.")

    runner._sample = sample
    return raised


def now_and_then():
    """Seldom enough for the limit to grow again between, or steps of one token would never fill the cache."""
    steps = count(1)
    return lambda _rows: next(steps) % 10 == 0


def more_than_two():
    return lambda rows: rows > 2


@pytest.mark.parametrize("when", [now_and_then, more_than_two])
@pytest.mark.parametrize("pages", [None, 20])
async def test_memory_that_is_short_changes_nothing(engine, tiny, monkeypatch, pages, when):
    wanted = await mixed(engine, 16)
    want = await told(engine, wanted)
    tokens, lengths = want[0]
    assert lengths == [len(one) if i & 1 else None for i, one in enumerate(tokens)]
    preempted, original = [], RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request", lambda state: preempted.append(1) or original(state)
    )
    short = await started(tiny, **({"cache_bytes": pages * PER_PAGE} if pages else {}))
    try:
        raised = failing_after_drawing(short, when())
        assert_same(await told(short, wanted), want)
        assert len(raised) > 10
        assert bool(preempted) is bool(pages)
        await nothing_left(short)
    finally:
        await short.stop()


async def test_a_neighbours_broken_numbers_change_nothing(tiny):
    """Under one mask they reach everybody's log-probabilities, and the step is made again."""
    engine = await started(tiny, attn="sdpa")
    try:
        wanted = await mixed(engine, 12)
        want = await told(engine, wanted)
        poison = max(set(range(3, 280)).difference(*[prompt for prompt, _, _ in wanted], *want[0][0]))

        def spoil(_module, args, out):
            return out.masked_fill((args[0] == poison).unsqueeze(-1), torch.nan)

        engine._batch._manager.model.get_input_embeddings().register_forward_hook(spoil)
        broken = [
            asyncio.create_task(
                engine._batch.run([5] * n + [poison], 9, Sampling(logprobs=1, grammar=wanted[2][2].grammar))
            )
            for n in (0, 5, 40, 80)
        ]
        assert_same(await told(engine, wanted), want)
        for task in broken:
            with pytest.raises(Failed, match="no number"):
                await task
        await nothing_left(engine)
    finally:
        await engine.stop()
