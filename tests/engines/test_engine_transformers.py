"""The transformers engine with a tiny random model: what a request may ask, and what it can never do to another."""

import asyncio
import json
import threading

import pytest
from engine_harness import CONTEXT, GREEDY, KINDS, build_tiny, chat, completion, eventually, started, tokens_of
from openai.types import Completion
from openai.types.chat import ChatCompletion

from rejoinder.worker.engines.transformers.sampling import Sampling
from rejoinder.worker.errors import BadRequest, EngineGone, Missing, RequestTooLarge, Unavailable

pytestmark = pytest.mark.asyncio(loop_scope="module")


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


async def test_compiled_code_is_not_fetched_unasked(engine):
    assert engine._batch._manager.continuous_batching_config.auto_switch_to_flash is False


async def test_a_context_past_the_models_positions_is_refused(tiny):
    with pytest.raises(EngineGone, match=rf"max_model_len is {CONTEXT + 1},.* knows {CONTEXT} positions"):
        await started(tiny, max_model_len=CONTEXT + 1)
    exact = await started(tiny, max_model_len=CONTEXT)
    full = await exact.generate(completion({"prompt": [5] * 10, "max_tokens": CONTEXT - 10}))
    assert full["usage"]["total_tokens"] == CONTEXT
    await exact.stop()


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
    whole = await tokens_of(engine._batch, [5, 6, 7], 24, Sampling())
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


async def test_stopping_tells_those_whose_text_waits(tiny):
    engine = await started(tiny)
    held = threading.Event()
    blocking = [engine._pool.submit(held.wait, 20) for _ in range(2)]
    waiting = [asyncio.create_task(engine.generate(completion(GREEDY, f"r{i}"))) for i in range(3)]
    await eventually(lambda: engine._pool._work_queue.qsize() == 3)
    await engine.stop()
    held.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable] * 3
    # What the threads were at is let end, not cut off: a thread says so a moment after it was let go.
    assert await asyncio.gather(*map(asyncio.wrap_future, blocking)) == [True, True]


async def test_a_sequence_that_its_thread_has_lost_is_told_of_the_stop(tiny, monkeypatch):
    engine = await started(tiny)
    # As when the stop comes just while the thread lets it in.
    monkeypatch.setattr(engine._batch._manager, "add_request", lambda *_, request_id, **__: request_id)
    lost = asyncio.create_task(engine._batch.run([5, 6], 4, Sampling()))
    await asyncio.sleep(0)
    await engine.stop()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(lost, 20)
