"""What one sequence does to the others: steps out of memory, forwards that raise, logits that are no numbers."""

import asyncio
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from engine_harness import CONTEXT, build_tiny, eventually, started
from neighbours_harness import PER_PAGE, nothing_left, outcomes, sampling, sequences

from rejoinder.worker.engines.transformers.recovery import HOPELESS, is_device_lost, is_out_of_memory
from rejoinder.worker.engines.transformers.sampling import Sampling
from rejoinder.worker.errors import Failed, Unavailable

pytestmark = pytest.mark.asyncio(loop_scope="module")

CPU_OUT = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."


def absent(wanted, want):
    """A token that is in nobody's sequence: a neighbour that drew the poison would fail rightly."""
    return max(set(range(3, 280)).difference(*[prompt for prompt, _, _ in wanted], *want))


@contextmanager
def before_forward(engine, check):
    """`check` is called with the step's token ids and its number of sequences; counts what it raises."""
    raised = []

    def hook(_model, _args, kwargs):
        try:
            check(kwargs["input_ids"][0].tolist(), len(kwargs["cu_seq_lens_q"]) - 1)
        except Exception as exc:
            raised.append(type(exc))
            raise

    handle = engine._batch._manager.model.register_forward_pre_hook(hook, with_kwargs=True)
    yield raised
    handle.remove()


def raising(error, when):
    def check(tokens, running):
        if when(tokens, running):
            raise error

    return check


@pytest.mark.parametrize(
    "too_large",
    [
        lambda tokens, _running: len(tokens) > 20,
        lambda _tokens, running: running > 3,
        lambda _tokens, running: running > 1,
        lambda tokens, _running: len(tokens) > 1,
        lambda tokens, running: running > 4 and len(tokens) == running,  # where all decode
    ],
    ids=["tokens", "three", "one", "token", "decode"],
)
@pytest.mark.parametrize("attn", ["varlen", "sdpa"])
async def test_a_step_that_is_too_large_fails_nobody(tiny, too_large, attn):
    engine = await started(tiny, attn=attn)
    try:
        wanted = sequences(14)
        want = await outcomes(engine._batch, *wanted)
        with before_forward(engine, raising(torch.OutOfMemoryError("CUDA out of memory."), too_large)) as raised:
            assert await outcomes(engine._batch, *wanted) == want
        assert raised
        assert await outcomes(engine._batch, *wanted) == want
        await nothing_left(engine)
    finally:
        await engine.stop()


async def test_memory_that_is_short_for_a_while_fails_nobody(engine):
    wanted = sequences(12)
    want = await outcomes(engine._batch, *wanted)
    steps = count()
    short = {1, 4, 5, 6, 20, 21, 30, 45}  # three in a row: less than what gives up one of three
    with before_forward(
        engine, raising(torch.OutOfMemoryError("CUDA out of memory."), lambda *_: next(steps) in short)
    ) as raised:
        assert await outcomes(engine._batch, *wanted) == want
    assert len(raised) == len(short)
    await nothing_left(engine)


ERRORS = [
    (torch.OutOfMemoryError("CUDA out of memory."), Unavailable, "out_of_memory"),
    (RuntimeError(CPU_OUT), Unavailable, "out_of_memory"),
    (MemoryError(), Unavailable, "out_of_memory"),
    (IndexError("index out of range in self"), Failed, None),
    (RuntimeError("The size of tensor a must match"), Failed, None),
]


@pytest.mark.parametrize(
    ("error", "kind", "code"), ERRORS, ids=lambda value: getattr(value, "__name__", str(value))[:12]
)
async def test_the_one_that_cannot_run_fails_alone(engine, error, kind, code):
    wanted = sequences(10)
    want = await outcomes(engine._batch, *wanted)
    poison_token = absent(wanted, want)
    # Alone, at the end and in the middle of a prompt that is longer than a step.
    poison = [
        ([poison_token], 5, Sampling()),
        ([9] * 30 + [poison_token], 5, sampling(1)),
        ([8] * 90 + [poison_token] + [8] * 20, 5, Sampling()),
    ]
    with before_forward(engine, raising(error, lambda tokens, _: poison_token in tokens)) as raised:
        *results, one, two, three = await outcomes(engine._batch, *wanted, poison=poison)
    assert raised
    assert results == want
    for failed in (one, two, three):
        assert (type(failed), failed.code) == (kind, code)
    assert await outcomes(engine._batch, *wanted) == want
    await nothing_left(engine)


async def test_it_is_found_while_it_decodes(engine):
    wanted = sequences(10)
    want = await outcomes(engine._batch, *wanted)
    # What it says itself is its poison: a token that is in nobody else's sequence, and not its last.
    index, token = next(
        (i, token)
        for i, tokens in enumerate(want)
        for token in tokens[1:-1]
        if not any(token in (*wanted[j][0], *want[j]) for j in range(len(want)) if j != i) and token not in wanted[i][0]
    )
    with before_forward(engine, raising(MemoryError(), lambda tokens, _: token in tokens)):
        results = await outcomes(engine._batch, *wanted)
    assert type(results[index]) is Unavailable
    assert "out of memory" in results[index].message
    assert [result for i, result in enumerate(results) if i != index] == want[:index] + want[index + 1 :]
    await nothing_left(engine)


async def test_what_admission_would_have_refused_fails_alone(engine):
    wanted = sequences(6)
    want = await outcomes(engine._batch, *wanted)
    *results, failed = await outcomes(engine._batch, *wanted, poison=[([10**6], 5, Sampling())])
    assert results == want
    assert type(failed) is Failed
    await nothing_left(engine)


async def test_what_a_failure_says_quotes_nothing(engine, caplog):
    poison_token = 285
    error = ValueError("a prompt, word for word")
    with before_forward(engine, raising(error, lambda tokens, _: poison_token in tokens)):
        (failed,) = await outcomes(engine._batch, ([poison_token], 5, Sampling()))
    assert (type(failed), failed.message) == (Failed, "the engine failed on this request: ValueError")
    assert "before_forward" in caplog.text or "hook" in caplog.text
    assert "word for word" not in caplog.text
    await nothing_left(engine)


async def test_a_stop_that_raises_is_its_own_sequences_failure(engine):
    """Outputs of one step come together: all four end in the same one."""
    want = await outcomes(engine._batch, *[([5 + i] * 4, 9, Sampling()) for i in range(4)])

    def broken(tokens):
        if len(tokens) == 9:
            raise ValueError("broken")

    async with asyncio.timeout(60):
        first, *others = await outcomes(
            engine._batch,
            *[([5 + i] * 4, 9, Sampling(), broken if i == 0 else lambda _: False) for i in range(4)],
        )
    assert type(first) is ValueError
    assert others == want[1:]
    await nothing_left(engine)


async def test_recovery_and_preemption_and_cancelling_together(tiny):
    big = await started(tiny)
    wanted = [([5 + i] * (20 + i), 60, sampling(i)) for i in range(8)]
    want = await outcomes(big._batch, *wanted)
    poison_token = absent(wanted, want)
    await big.stop()
    small = await started(tiny, cache_bytes=12 * PER_PAGE)
    try:
        batch, processor = small._batch, small._batch._manager.batch_processor
        preempted, original = count(), processor.offloading_manager.offload_requests

        def counted():
            next(preempted)
            return original()

        processor.offloading_manager.offload_requests = counted
        steps = count()

        def check(tokens, running):
            if poison_token in tokens or running > 3 or next(steps) % 7 == 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        with before_forward(small, check) as raised:
            others = [asyncio.create_task(batch.run([60 + i] * 30, 100, Sampling())) for i in range(3)]
            poison = [([9] * 20 + [poison_token], 50, Sampling())]
            together = asyncio.create_task(outcomes(batch, *wanted, poison=poison))
            for number, other in enumerate(others):
                await eventually(lambda number=number: batch.steps > 10 * number + 10 or together.done())
                other.cancel()
            *results, failed = await together
            await asyncio.wait(others)
        assert len(raised) > 20
        assert next(preempted) > 0
        assert results == want
        assert type(failed) is Unavailable
        await nothing_left(small)
    finally:
        await small.stop()


async def test_cancelled_while_their_step_is_done_again(engine):
    wanted = sequences(4)
    want = await outcomes(engine._batch, *wanted)
    loop = asyncio.get_running_loop()
    doomed = [asyncio.create_task(engine._batch.run([200 + i] * 8, 100, Sampling())) for i in range(3)]
    failed = count()

    def check(tokens, running):
        if running > 1 and any(token >= 200 for token in tokens):
            if next(failed) == 1:
                for task in doomed:
                    loop.call_soon_threadsafe(task.cancel)
            raise MemoryError

    with before_forward(engine, check) as raised:
        assert await outcomes(engine._batch, *wanted) == want
        await asyncio.wait(doomed)
    assert all(task.cancelled() for task in doomed)
    assert len(raised) > 1
    await nothing_left(engine)


async def test_without_memory_for_anybody_the_engine_ends(tiny):
    engine = await started(tiny)
    try:
        with before_forward(engine, raising(torch.OutOfMemoryError("CUDA out of memory."), lambda *_: True)):
            results = await outcomes(engine._batch, *[([5] * 4, 5, Sampling())] * (HOPELESS + 4))
        assert {type(result) for result in results} == {Unavailable}
        assert sum(result.code == "out_of_memory" for result in results) == HOPELESS
        async with asyncio.timeout(60):
            await engine.wait_gone()
    finally:
        await engine.stop()


@pytest.mark.parametrize("attn", ["varlen", "sdpa", "eager"])
async def test_values_that_are_no_numbers_are_one_requests_error(tiny, attn):
    """In attention under one mask for the whole step they reach the neighbours."""
    engine = await started(tiny, attn=attn)
    try:
        wanted = sequences(10)
        want = await outcomes(engine._batch, *wanted)
        poison_token = absent(wanted, want)
        poison = [
            ([poison_token], 5, Sampling()),
            ([9] * 30 + [poison_token] * 3, 5, sampling(1)),
            ([8] * 90 + [poison_token], 5, sampling(3)),
        ]

        def spoil(_module, args, out):
            return out.masked_fill((args[0] == poison_token).unsqueeze(-1), torch.nan)

        engine._batch._manager.model.get_input_embeddings().register_forward_hook(spoil)
        *results, one, two, three = await outcomes(engine._batch, *wanted, poison=poison)
        assert results == want
        for failed in (one, two, three):
            assert (type(failed), failed.code) == (Failed, "no_number")
            assert "no number" in failed.message
        assert await outcomes(engine._batch, *wanted) == want
        await nothing_left(engine)
    finally:
        await engine.stop()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("how", range(5))
async def test_logits_that_are_no_numbers(engine, value, how):
    wanted = sequences(6)
    want = await outcomes(engine._batch, *wanted)
    poison_token = absent(wanted, want)

    def spoil(_model, _args, kwargs, out):
        rows = kwargs["input_ids"][0, kwargs["logits_indices"]] == poison_token
        if value == torch.inf:
            out.logits[0, rows, 7] = value
        else:
            out.logits[0, rows] = value
        return out

    handle = engine._batch._manager.model.register_forward_hook(spoil, with_kwargs=True)
    *results, failed = await outcomes(engine._batch, *wanted, poison=[([5, poison_token], 5, sampling(how))])
    handle.remove()
    assert results == want
    assert (type(failed), failed.code) == (Failed, "no_number")
    await nothing_left(engine)


async def test_a_sliding_window_is_prefilled_anew(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    build_tiny(tmp_path)
    torch.manual_seed(0)
    MistralForCausalLM(
        MistralConfig(
            vocab_size=290,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            sliding_window=32,
            bos_token_id=0,
            eos_token_id=1,
            initializer_range=0.3,
        )
    ).save_pretrained(tmp_path)
    engine = await started(tmp_path, max_batch_tokens=48)
    try:
        assert engine._batch._manager.batch_processor.cache.cache_allocators.keys() == {"sliding_attention"}
        wanted = sequences(8, longest=120)
        want = await outcomes(engine._batch, *wanted)
        poison_token = absent(wanted, want)
        steps = count()
        check = raising(MemoryError(), lambda tokens, _: next(steps) in {1, 2, 8, 9, 30} or poison_token in tokens)
        with before_forward(engine, check) as raised:
            results = await outcomes(
                engine._batch, *wanted, poison=[([8] * 100 + [poison_token] + [8] * 30, 5, Sampling())]
            )
        assert len(raised) > 5
        assert results[:-1] == want
        assert type(results[-1]) is Unavailable
        await nothing_left(engine)
    finally:
        await engine.stop()


async def test_which_errors_are_what():
    for error, memory, lost in [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True, False),
        (MemoryError(), True, False),
        (RuntimeError(CPU_OUT), True, False),
        (RuntimeError("CUDA error: out of memory"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (RuntimeError("CUDA error: device-side assert triggered"), False, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False, True),
        (torch.AcceleratorError("an illegal memory access was encountered"), False, True),
        (ValueError("out of memory"), False, False),
    ]:
        assert (is_out_of_memory(error), is_device_lost(error)) == (memory, lost), error
