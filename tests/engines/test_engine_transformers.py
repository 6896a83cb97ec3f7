"""The transformers engine with a tiny random model: what a request may ask, and what it can never do to another."""

import asyncio
import json
import threading
from itertools import count

import pytest
from engine_harness import CONTEXT, build_tiny, chat, completion, eventually, started
from openai.types import Completion
from openai.types.chat import ChatCompletion

from rejoinder.worker.engines.transformers_sampling import Sampling
from rejoinder.worker.errors import BadRequest, EngineGone, Missing, RequestTooLarge, Unavailable

pytestmark = pytest.mark.asyncio(loop_scope="module")

PER_PAGE = 2 * 2 * 2 * 8 * 4 * 16  # both of K and V, layers, heads, size, bytes, tokens
GREEDY = {"prompt": "the quick", "temperature": 0, "max_tokens": 24}
KINDS = [
    {"temperature": 0},
    {"temperature": 1},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.5},
    {"temperature": 2, "top_k": 10**9},
]


def mixed(number):
    return [
        completion(
            {"prompt": f"fox {i} jumps" * (1 + i % 5), "max_tokens": 8 + 5 * (i % 4), **KINDS[i % len(KINDS)]},
            f"mix-{i}",
        )
        for i in range(number)
    ]


BAD = [
    ({"prompt": [0, 299 + 1]}, BadRequest, "prompt"),
    ({"prompt": [2**31 - 1]}, BadRequest, "prompt"),
    ({"prompt": [-1]}, BadRequest, "prompt"),
    ({"prompt": [5] * CONTEXT}, RequestTooLarge, "prompt"),
    ({"prompt": [[5], [5] * (CONTEXT + 1)]}, RequestTooLarge, "prompt"),
    ({"prompt": "x " * 100_000}, RequestTooLarge, "prompt"),
    ({"prompt": "x", "max_tokens": CONTEXT}, BadRequest, "max_tokens"),
    ({"prompt": ""}, BadRequest, "prompt"),
    ({"prompt": []}, BadRequest, "prompt"),
    ({"prompt": "x", "temperature": None}, BadRequest, "temperature"),
    ({"prompt": "x", "temperature": -1}, BadRequest, "temperature"),
    ({"prompt": "x", "top_p": 0}, BadRequest, "top_p"),
    ({"prompt": "x", "top_k": -2}, BadRequest, "top_k"),
    ({"prompt": "x", "n": 129}, BadRequest, "n"),
    ({"prompt": "x", "model": "other"}, Missing, "model"),
]


async def test_bad_requests_harm_no_neighbour(engine):
    good = mixed(12)
    alone = [await engine.generate(request) for request in good]
    bad = [completion(body, f"bad-{i}") for i, (body, _, _) in enumerate(BAD)]
    together = [request for pair in zip(good, bad, strict=False) for request in pair] + bad[len(good) :]
    results = await asyncio.gather(*map(engine.generate, together), return_exceptions=True)
    answers = dict(zip([request.response_id for request in together], results, strict=True))
    assert [answers[request.response_id] for request in good] == alone
    for request, (_, kind, param) in zip(bad, BAD, strict=True):
        error = answers[request.response_id]
        assert type(error) is kind, (request.body, error)
        assert error.param.partition(".")[0] == param
        assert error.message
    assert engine.capacity >= engine._batch.running == 8


async def test_what_transformers_cannot_do_is_done(engine):
    """Temperature 0, top_k past the vocabulary and off, whole numbers, one response id twice at once."""
    for body in (
        {"temperature": 0},
        {"temperature": 0.0, "top_k": 0},
        {"temperature": 1, "top_k": 10**9, "seed": 1},
        {"temperature": 1, "top_k": -1, "seed": 1},
    ):
        one, two = await asyncio.gather(
            *[engine.generate(completion({"prompt": "dog", "max_tokens": 6, **body})) for _ in range(2)]
        )
        assert json.dumps(one) == json.dumps(two)
    assert not engine._batch._manager.output_router.result_handlers


async def test_results_do_not_depend_on_the_batch(engine):
    requests = mixed(24)
    alone = [await engine.generate(request) for request in requests]
    for order in (requests, requests[::-1]):
        together = await asyncio.gather(*map(engine.generate, order))
        assert {body["id"]: body for body in together} == {body["id"]: body for body in alone}


async def test_results_do_not_depend_on_preemption(engine, tiny):
    requests = [completion({"prompt": "lazy dog " * 6, "max_tokens": 100, **KINDS[i % 5]}, f"p-{i}") for i in range(8)]
    want = await asyncio.gather(*map(engine.generate, requests))
    small = await started(tiny, cache_bytes=12 * PER_PAGE, max_model_len=160)
    try:
        offloading = small._batch._manager.batch_processor.offloading_manager
        preempted = count()
        original = offloading.offload_requests

        def counted(*args, **kwargs):
            next(preempted)
            return original(*args, **kwargs)

        offloading.offload_requests = counted
        assert await asyncio.gather(*map(small.generate, requests)) == want
        assert next(preempted) > 0
    finally:
        await small.stop()


def at_preemption(engine, happened, resume):
    """Set `happened` when a sequence is put back for want of cache; the generation thread goes on with `resume`."""
    processor, loop = engine._batch._manager.batch_processor, asyncio.get_running_loop()
    original = processor.offloading_manager.offload_requests

    def offload():
        done = original()
        if processor.scheduler.block_new_requests:
            loop.call_soon_threadsafe(happened.set)
            resume.wait()
        return done

    processor.offloading_manager.offload_requests = offload


@pytest.mark.parametrize("how", ["cancelled", "stopped"])
async def test_a_sequence_ended_from_outside_lets_the_preempted_ones_in(tiny, how):
    small = await started(tiny, cache_bytes=10 * PER_PAGE, max_running=6)
    happened, resume = asyncio.Event(), threading.Event()
    at_preemption(small, happened, resume)
    # The cache is full when both have about 80 tokens.
    stop = None if how == "cancelled" else lambda tokens: len(tokens) >= 70
    both = [asyncio.create_task(small._batch.run([5 + i] * 40, 110, Sampling(), stop)) for i in range(2)]
    try:
        async with asyncio.timeout(60):
            await happened.wait()
            (active,) = small._batch._manager.batch_processor.scheduler.active_requests.values()
            newcomer = asyncio.create_task(small._batch.run([7], 1, Sampling()))
            if how == "cancelled":
                both.pop(active.initial_tokens[0] - 5).cancel()
            await asyncio.sleep(0)  # the cancelled one takes itself out of the batch
            resume.set()
            lengths = [len(tokens) for tokens in await asyncio.gather(newcomer, *both)]
        assert lengths == ([1, 110] if how == "cancelled" else [1, 70, 70])
    finally:
        resume.set()
        for task in both:
            task.cancel()
        await small.stop()


async def test_nothing_is_kept_of_what_was_stopped(engine):
    text = (await engine.generate(completion(GREEDY)))["choices"][0]["text"]
    stopping = {**GREEDY, "max_tokens": 100, "stop": text[5:8]}
    await asyncio.gather(*[engine.generate(completion(stopping, f"s{i}")) for i in range(200)])
    manager = engine._batch._manager
    await eventually(lambda: not manager.batch_processor.scheduler.has_pending_requests())
    assert manager.output_router.output_queue.qsize() == 0
    assert not manager.output_router.result_handlers


async def test_many_choices_leave_room_for_a_neighbour(engine):
    active = engine._batch._manager.batch_processor.scheduler.active_requests
    many = asyncio.create_task(engine.generate(completion({"prompt": "x", "n": 128, "max_tokens": 100}, "many")))
    await eventually(lambda: active)
    one = await engine.generate(completion({"prompt": "fox", "max_tokens": 1}))
    assert one["usage"]["completion_tokens"] == 1
    assert not many.done()
    assert len(active) <= 2, "a quarter of the places"
    assert len((await many)["choices"]) == 128


async def test_compiled_code_is_not_fetched_unasked(engine):
    assert engine._batch._manager.continuous_batching_config.auto_switch_to_flash is False


async def test_a_context_past_the_models_positions_is_refused(tiny):
    with pytest.raises(EngineGone, match=rf"max_model_len is {CONTEXT + 1},.* knows {CONTEXT} positions"):
        await started(tiny, max_model_len=CONTEXT + 1)
    exact = await started(tiny, max_model_len=CONTEXT)
    full = await exact.generate(completion({"prompt": [5] * 10, "max_tokens": CONTEXT - 10}))
    assert full["usage"]["total_tokens"] == CONTEXT
    await exact.stop()


async def test_a_prompt_larger_than_the_cache_is_refused(tiny):
    small = await started(tiny, cache_bytes=3 * PER_PAGE)
    try:
        neighbour = asyncio.create_task(small.generate(completion({**GREEDY, "max_tokens": 20})))
        for body, kind in (
            ({"prompt": [5] * 48}, RequestTooLarge),
            ({"prompt": [5] * 40, "max_tokens": 9}, BadRequest),
        ):
            with pytest.raises(kind):
                await small.generate(completion(body))
        full = await small.generate(completion({"prompt": [5] * 40, "max_tokens": 8, "temperature": 0}))
        assert full["usage"]["total_tokens"] == 48
        assert (await neighbour)["usage"]["completion_tokens"] == 20
    finally:
        await small.stop()


async def test_the_shape_is_openais(engine):
    body = await engine.generate(completion({**GREEDY, "n": 2, "prompt": ["fox", "dog"]}, "id-1"))
    parsed = Completion.model_validate(body, strict=True)
    assert parsed.id == "cmpl-id-1"
    assert parsed.created == 1_700_000_000
    assert [choice.index for choice in parsed.choices] == [0, 1, 2, 3]
    assert parsed.usage.total_tokens == parsed.usage.prompt_tokens + parsed.usage.completion_tokens
    one = await engine.generate(completion({**GREEDY, "prompt": "dog"}))
    assert [choice.text for choice in parsed.choices][2:] == [one["choices"][0]["text"]] * 2
    body = await engine.generate(chat({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}, "id-2"))
    parsed = ChatCompletion.model_validate(body, strict=True)
    assert parsed.id == "chatcmpl-id-2"
    assert parsed.choices[0].message.role == "assistant"
    assert parsed.usage.completion_tokens == 4
    assert parsed.choices[0].finish_reason == "length"


async def test_seeds(engine):
    def texts(body):
        return [choice["text"] for choice in body["choices"]]

    body = {"prompt": "fox", "max_tokens": 16, "temperature": 1, "n": 4}
    first = texts(await engine.generate(completion(body, "a")))
    assert len(set(first)) == 4
    assert first == texts(await engine.generate(completion(body, "a")))
    assert not set(first) & set(texts(await engine.generate(completion(body, "b"))))
    seeded = texts(await engine.generate(completion({**body, "seed": -5}, "a")))
    assert seeded == texts(await engine.generate(completion({**body, "seed": -5}, "b")))
    assert not set(seeded) & set(first)


@pytest.mark.parametrize("where", [0, 3, 11])
async def test_stop_strings(engine, where):
    whole = await engine.generate(completion(GREEDY))
    text = whole["choices"][0]["text"]
    stop = text[where : where + 3]
    body = await engine.generate(completion({**GREEDY, "stop": ["never there", stop]}))
    choice = body["choices"][0]
    assert choice["text"] == text[: text.find(stop)]
    assert choice["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"] or where == 11
    absent = await engine.generate(completion({**GREEDY, "stop": "never there"}))
    assert absent == whole
    router = engine._batch._manager.output_router
    assert not router.result_handlers
    await eventually(lambda: not engine._batch._manager.batch_processor.scheduler.active_requests)


async def test_end_of_sequence(tiny, tmp_path, engine):
    whole = await engine._batch.run([5, 6, 7], 24, Sampling())
    eos = whole[9]
    ending = await started(build_tiny(tmp_path, eos=[1, eos]))
    try:
        body = await ending.generate(completion({"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 24}))
        length = whole.index(eos)
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["choices"][0]["text"] == ending._text.decode(whole[:length])
        assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": length + 1, "total_tokens": length + 4}
    finally:
        await ending.stop()


async def test_cancelling_frees_everything(engine):
    manager, free = engine._batch._manager, engine._slots._value
    tasks = [asyncio.create_task(engine.generate(completion({**GREEDY, "max_tokens": 200, "n": 3}))) for _ in range(6)]
    await eventually(lambda: len(manager.batch_processor.scheduler.active_requests) >= 8)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    assert not manager.output_router.result_handlers
    await eventually(lambda: not manager.batch_processor.scheduler.has_pending_requests())
    assert engine._slots._value == free
    assert (await engine.generate(completion(GREEDY)))["usage"]["completion_tokens"] == 24


async def test_chat_templates(engine, tmp_path):
    system = {"role": "system", "content": "be brief"}
    user = {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
    asked = {"temperature": 0, "max_tokens": 5}
    plain = await engine.generate(completion({**asked, "prompt": "[system]be brief[user]hi[assistant]"}))
    for first in (system, {**system, "role": "developer"}):
        body = await engine.generate(chat({**asked, "messages": [first, user]}))
        assert body["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
        assert body["usage"] == plain["usage"]
    with pytest.raises(BadRequest, match="a system message must come first") as caught:
        await engine.generate(chat({"messages": [user, system]}))
    assert caught.value.param == "messages"
    assert engine.paths == {"/v1/completions", "/v1/chat/completions"}
    bare = await started(build_tiny(tmp_path, template=None))
    assert bare.paths == {"/v1/completions"}
    await bare.stop()


async def test_the_death_of_the_generation_thread_is_everybodys(tiny):
    """What admission refuses, given to transformers itself, ends its thread; the engine says so and takes no more."""
    dying = await started(tiny)
    try:
        neighbours = [asyncio.create_task(dying.generate(completion({**GREEDY, "max_tokens": 200}))) for _ in range(3)]
        manager = dying._batch._manager
        await eventually(lambda: len(manager.batch_processor.scheduler.active_requests) == 3)
        for call in (dying._batch.run([10**6], 5, Sampling()), *neighbours):
            with pytest.raises(Unavailable):
                await call
        async with asyncio.timeout(5):
            await dying.wait_gone()
        assert dying.capacity == 0
        with pytest.raises(Unavailable):
            await dying.generate(completion(GREEDY))
    finally:
        await dying.stop()


async def test_stopping_answers_what_runs(tiny):
    engine = await started(tiny)
    call = asyncio.create_task(engine.generate(completion({**GREEDY, "max_tokens": 200})))
    await eventually(lambda: engine._batch.steps > 2)
    await engine.stop()
    with pytest.raises(Unavailable):
        await call
    with pytest.raises(Unavailable):
        await engine.generate(completion(GREEDY))
    await engine.stop()
    assert not engine._batch._manager.is_running()


async def test_progress_grows_with_steps(engine):
    before = engine.progress
    await engine.generate(completion(GREEDY))
    assert engine.progress >= before + 24


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is no directory"),
        ([], "no weights"),
        (["config.json", "pytorch_model.bin"], "only pytorch_model.bin, which is pickled"),
        (["model.safetensors"], "cannot be loaded"),
    ],
)
async def test_what_cannot_be_loaded_says_why(tmp_path, files, message):
    model = tmp_path / "model"
    if files is not None:
        model.mkdir()
        for file in files:
            (model / file).write_text("{}")
    with pytest.raises(EngineGone, match=message) as caught:
        await started(model)
    assert "\n" not in str(caught.value)


async def test_an_unusable_device_is_said(tiny):
    with pytest.raises(EngineGone, match="device 'nonsense'"):
        await started(tiny, device="nonsense")


async def test_stop_strings_across_characters_of_several_tokens(engine):
    from rejoinder.worker.engines.transformers_text import StopMatcher

    text = "a日本語b🦊c the lazy dog"
    tokens = engine._text.encode(text)
    for stop in ("日", "語b", "🦊c", "本語b🦊", "lazy dog", "g"):
        matcher = StopMatcher(engine._text, [stop, "zzz"])
        hits = [matcher.push(tokens[:n]) for n in range(1, len(tokens) + 1)]
        first = hits.index(True)
        assert stop in engine._text.decode(tokens[: first + 1])
        assert stop not in engine._text.decode(tokens[:first])


@pytest.mark.parametrize("broken", [b"\x80", b"\xf0", b"\xf0\x9f"])
async def test_a_run_of_broken_characters_is_decoded_in_pieces(engine, broken):
    from rejoinder.worker.engines.transformers_text import StopMatcher

    class Counting:
        decoded = 0

        def decode(self, tokens):
            self.decoded += len(tokens)
            return engine._text.decode(tokens)

    letters = engine._text._tokenizer.get_vocab()
    raw = [letters[bytes_to_letter(value)] for value in broken] * 300
    tokens = [letters["a"], *raw, *engine._text.encode("the end 🦊")]
    text = Counting()
    matcher = StopMatcher(text, ["d 🦊"])
    hits = [matcher.push(tokens[:n]) for n in range(1, len(tokens) + 1)]
    assert hits.index(True) == len(tokens) - 1
    assert text.decoded < 60 * len(tokens)


def bytes_to_letter(value):
    """The letter that stands for a byte in byte-level vocabularies, of those that are no printable letters."""
    from tokenizers.pre_tokenizers import ByteLevel

    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    if value in printable:
        return chr(value)
    assert len(ByteLevel.alphabet()) == 256
    return chr(256 + sorted(set(range(256)) - printable).index(value))
