"""What an engine that streams promises, of every one: the chunks are OpenAI's, and together the plain answer."""

import asyncio
import json

import pytest
import test_engine_conformance
from engine_conformance import streamed
from engine_harness import chat, completion, eventually
from needs import needs
from stream_harness import joined, stream, streams

# The same engines, built in the same way.
engine, model, subject = test_engine_conformance.engine, test_engine_conformance.model, test_engine_conformance.subject
pytest_generate_tests = test_engine_conformance.pytest_generate_tests
pytestmark = [pytest.mark.asyncio(loop_scope="module"), needs("streams")]

NEIGHBOURS = 16
TURNS = {"messages": [{"role": "user", "content": "日本 🦊?"}], "max_tokens": 30, "temperature": 1, "seed": 3}
BODIES = [
    completion({"prompt": ["the quick", "fox", "日"], "n": 3, "max_tokens": 20}, "many"),
    completion({"prompt": "the quick", "max_tokens": 1, "temperature": 0}, "one"),
    completion({"prompt": "dog", "n": 2, "max_tokens": 20, "logprobs": 2}, "told"),
    completion({"prompt": "dog", "max_tokens": 40, "stop": ["a", "the", "q"]}, "stop"),
    completion({"prompt": "dog", "max_tokens": 40, "stop_token_ids": list(range(60, 76)), "logprobs": 0}, "token"),
]
CHATS = [
    chat(TURNS, "chat"),
    chat({**TURNS, "n": 2, "logprobs": True, "top_logprobs": 3}, "told-chat"),
    chat({**TURNS, "temperature": 0, "stop": "e", "logprobs": True}, "stop-chat"),
]


async def held(engine, subject, requests):
    """Streamed all together, each is what it is alone and in one piece."""
    told = await streams(engine, requests)
    for request, (chunks, last) in zip(requests, told, strict=True):
        assert json.loads(json.dumps(chunks)) == chunks
        got, want = joined(chunks, last), await engine.generate(request)
        assert near(got, want), (request.body, got["choices"], want["choices"])
    return told


def near(one, two):
    """Equal, but for the last digits of log-probabilities."""
    if isinstance(one, float):
        return one == pytest.approx(two, abs=2e-4)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(near(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(near, one, two))
    return one == two


async def test_the_chunks_together_are_the_plain_answer(engine, subject):
    told = await held(engine, subject, [subject.good(i) for i in range(NEIGHBOURS)])
    assert sum(len(chunks) for chunks, _ in told) > 2 * NEIGHBOURS, "more than one for each choice"


async def test_prompts_choices_stops_and_log_probabilities(engine, subject):
    conversations = CHATS if "/v1/chat/completions" in engine.paths else []
    await held(engine, subject, BODIES + conversations)


async def test_a_stop_string_never_leaks(engine, subject):
    body = {"prompt": "the quick", "max_tokens": 60, "temperature": 1, "seed": 5}
    text = (await engine.generate(completion(body)))["choices"][0]["text"]
    assert len(text) > 20
    stops = [text[at : at + size] for at in range(0, 20, 3) for size in (1, 2, 5)]
    await held(engine, subject, [completion({**body, "stop": stop}) for stop in stops])


async def test_characters_of_several_tokens(engine, subject):
    hot = {
        "prompt": "日本語 🦊👩‍🚀",
        "temperature": 2,
        "max_tokens": 24,
    }  # and broken ones
    told = await held(engine, subject, [completion({**hot, "seed": seed}) for seed in range(24)])
    texts = ["".join(chunk["choices"][0]["text"] for chunk in chunks) for chunks, _ in told]
    assert any("\ufffd" in text for text in texts)


async def test_text_is_told_while_it_is_made(engine, subject):
    chunks = []
    call = asyncio.create_task(engine.generate(streamed(subject.long(1), chunks.append)))
    await eventually(lambda: len(chunks) > 4)
    assert not call.done()
    call.cancel()
    await asyncio.wait({call})


async def test_cancelling_in_the_middle_stops_the_work_and_the_chunks(engine, subject):
    capacity, before = engine.capacity, engine.progress
    told = [[] for _ in range(2 * capacity)]
    requests = [streamed(subject.long(i), chunks.append) for i, chunks in enumerate(told)]
    calls = [asyncio.create_task(engine.generate(request)) for request in requests]
    await eventually(lambda: any(told))
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    assert any(call.cancelled() for call in calls)
    count = sum(map(len, told))
    assert len(await streams(engine, [subject.good(i) for i in range(capacity)])) == capacity
    assert sum(map(len, told)) == count
    # All that is left of the cancelled ones would be thousands of steps.
    assert engine.progress - before < 200 * capacity


async def test_a_bad_request_emits_nothing_and_harms_no_neighbour(engine, subject):
    good = [subject.good(i) for i in range(len(subject.bad))]
    plain = [await engine.generate(request) for request in good]
    told = []
    bad = [engine.generate(streamed(one.request, told.append)) for one in subject.bad]
    errors, answers = await asyncio.gather(asyncio.gather(*bad, return_exceptions=True), streams(engine, good))
    assert [(type(error), error.param) for error in errors] == [(one.error, one.param) for one in subject.bad]
    assert not told
    assert all(near(joined(*answer), want) for answer, want in zip(answers, plain, strict=True))


async def test_a_stream_that_cannot_be_told_fails_alone(engine, subject):
    def refuse(chunk):
        raise BufferError(chunk["id"])

    neighbour = asyncio.create_task(stream(engine, subject.good(1)))
    with pytest.raises(BufferError):
        await engine.generate(streamed(subject.long(1), refuse))
    late = []

    def refuse_later(chunk):
        late.append(chunk)
        if len(late) > 6:
            raise BufferError(chunk["id"])

    with pytest.raises(BufferError):
        await engine.generate(streamed(subject.long(2), refuse_later))
    assert len(late) == 7
    assert near(joined(*await neighbour), await engine.generate(subject.good(1)))
