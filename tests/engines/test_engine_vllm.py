"""The vLLM engine against a fake of vLLM (`fake_vllm/vllm.py`): vLLM needs a GPU, and the torch and transformers that
it pins exclude those of the other engine. What these tests show is the adapter: what it asks of `AsyncLLM`, and what it
makes of its answers, errors and death. That vLLM itself answers as the fake does, they cannot show.
"""

import asyncio

import pytest
from engine_harness import CONTEXT, build_tiny, chat, completion, eventually
from openai.types import Completion
from openai.types.chat import ChatCompletion
from vllm_harness import greedy, started_vllm

from rejoinder.worker.errors import BadRequest, Failed, Missing, RequestTooLarge, Unavailable

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": [5, 6, 7]},
        {"prompt": ["fox", "the lazy dog"]},
        {"max_tokens": 1},
        {"max_tokens": 100, "repetition_penalty": 1.3},
        {"presence_penalty": 1.5, "max_tokens": 60},
        {"frequency_penalty": -0.5, "presence_penalty": 0.3},
        {"n": 3},
        {"stop": ["never there"]},
    ],
    ids=str,
)
async def test_greedy_answers_are_those_of_the_transformers_engine(vllm_engine, engine, body):
    assert await greedy(vllm_engine, **body) == await greedy(engine, **body)


async def test_chat(vllm_engine, engine):
    assert vllm_engine.paths == {"/v1/completions", "/v1/chat/completions"}
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}]
    request = chat({"messages": messages, "temperature": 0, "max_completion_tokens": 8}, "id-2")
    assert await vllm_engine.generate(request) == await engine.generate(request)
    system = {"role": "system", "content": "x"}
    with pytest.raises(BadRequest, match="a system message must come first"):
        await vllm_engine.generate(chat({"messages": [messages[1], system]}))


async def test_a_model_without_a_template_serves_no_chat(fake, tmp_path):
    bare = await started_vllm(build_tiny(tmp_path, template=None))
    assert bare.paths == {"/v1/completions"}
    await bare.stop()


@pytest.mark.parametrize("where", [0, 3, 11, 15])
async def test_stop_strings(vllm_engine, engine, where):
    text = (await greedy(engine))["choices"][0]["text"]
    stop = ["never there", text[where : where + 3]]
    body = await greedy(vllm_engine, stop=stop)
    assert body == await greedy(engine, stop=stop)
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["text"] == text[: text.find(stop[1])]


async def test_stop_tokens_and_the_end_of_sequence(vllm_engine, engine, fake, tmp_path):
    asked = {"prompt": [5, 6, 7]}
    tokens = (await engine._batch.run([5, 6, 7], 24, sampling_of_nothing())).tokens
    stopped = await greedy(vllm_engine, **asked, stop_token_ids=[tokens[9]])
    assert stopped == await greedy(engine, **asked, stop_token_ids=[tokens[9]])
    assert stopped["choices"][0]["finish_reason"] == "stop"
    ending = await started_vllm(build_tiny(tmp_path, eos=[1, tokens[9]]), served_names=["tiny"])
    ended = await greedy(ending, **asked)
    await ending.stop()
    assert ended == {**stopped, "model": "tiny"}


def close(one, two):
    """Two bodies, but for what rounding makes of their floats."""
    if isinstance(one, float):
        return one == pytest.approx(two, abs=2e-4)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(close(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(close, one, two))
    return one == two


@pytest.mark.parametrize("stop", [{}, {"stop": ["never there"]}, {"stop": 11}, {"stop_token_ids": 9}], ids=str)
@pytest.mark.parametrize("alternatives", [0, 3, 20])
async def test_log_probabilities_are_those_of_the_transformers_engine(vllm_engine, engine, stop, alternatives):
    asked = {"prompt": [5, 6, 7], "max_tokens": 40, "repetition_penalty": 1.5}  # not all drawn are likeliest
    plain = await greedy(engine, **asked)
    text = plain["choices"][0]["text"]
    if stop.get("stop") == 11:
        stop = {"stop": text[11:14]}
    elif "stop_token_ids" in stop:
        sampling = engine._sampling(engine_body(asked), None, 0)
        stop = {"stop_token_ids": [(await engine._batch.run([5, 6, 7], 40, sampling)).tokens[9]]}
    body = await greedy(vllm_engine, **asked, **stop, logprobs=alternatives)
    assert close(body, await greedy(engine, **asked, **stop, logprobs=alternatives))
    assert Completion.model_validate(body, strict=True).choices[0].logprobs.token_logprobs
    assert close(plain, await greedy(vllm_engine, **asked))


def engine_body(asked):
    from rejoinder.worker.engines.admission import parse_body

    return parse_body("/v1/completions", {**asked, "temperature": 0})


async def test_log_probabilities_of_a_conversation(vllm_engine, engine):
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 12}
    request = chat({**body, "logprobs": True, "top_logprobs": 2}, "id-3")
    answer = await vllm_engine.generate(request)
    assert close(answer, await engine.generate(request))
    (choice,) = ChatCompletion.model_validate(answer, strict=True).choices
    assert [len(place.top_logprobs) for place in choice.logprobs.content] == [2] * 12
    with pytest.raises(BadRequest, match="top_logprobs needs logprobs"):
        await vllm_engine.generate(chat({**body, "top_logprobs": 2}))


async def test_a_schema_is_refused_and_plain_text_is_not(vllm_engine):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    for kind in ({"type": "json_object"}, named):
        with pytest.raises(BadRequest, match="response_format is not supported by engine vllm") as caught:
            await vllm_engine.generate(chat({**body, "response_format": kind}))
        assert caught.value.param == "response_format"
    assert (await vllm_engine.generate(chat({**body, "response_format": {"type": "text"}})))["choices"]


def sampling_of_nothing():
    from rejoinder.worker.engines.transformers.sampling import Sampling

    return Sampling()


async def test_what_vllm_is_asked(vllm_engine):
    body = {
        "prompt": "fox", "n": 2, "max_tokens": 40, "temperature": 0.7, "top_p": 0.9, "top_k": 10**9, "min_p": 0.05,
        "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.25, "seed": -1,
        "stop": "zzz", "stop_token_ids": [7],
    }  # fmt: skip
    running = vllm_engine._llm.running
    call = asyncio.create_task(vllm_engine.generate(completion(body)))
    await eventually(lambda: len(running) == 2)
    first, second = running.values()
    await call
    for asked in (first, second):
        assert (asked.n, asked.max_tokens, asked.temperature, asked.top_p, asked.min_p) == (1, 40, 0.7, 0.9, 0.05)
        assert asked.top_k == 0
        assert (asked.repetition_penalty, asked.presence_penalty, asked.frequency_penalty) == (1.2, 0.5, -0.25)
        assert (asked.stop, asked.stop_token_ids) == (["zzz"], [7])
        assert 0 <= asked.seed < 2**63
    assert first.seed != second.seed


async def test_seeds(vllm_engine):
    def texts(body):
        return [choice["text"] for choice in body["choices"]]

    body = {"prompt": "fox", "max_tokens": 16, "temperature": 1, "n": 4}
    answer = await vllm_engine.generate(completion(body, "a"))
    assert len(Completion.model_validate(answer, strict=True).choices) == 4
    first = texts(answer)
    assert len(set(first)) == 4
    assert first == texts(await vllm_engine.generate(completion(body, "a")))
    assert not set(first) & set(texts(await vllm_engine.generate(completion(body, "b"))))
    seeds = [texts(await vllm_engine.generate(completion({**body, "seed": -1}, name))) for name in "ab"]
    assert seeds[0] == seeds[1] != first


@pytest.mark.parametrize(
    ("body", "error", "param"),
    [
        ({"prompt": [300]}, BadRequest, "prompt"),
        ({"prompt": [5] * CONTEXT}, RequestTooLarge, "prompt"),
        ({"max_tokens": CONTEXT}, BadRequest, "max_tokens"),
        ({"temperature": 3}, BadRequest, "temperature"),
        ({"stop_token_ids": [300]}, BadRequest, "stop_token_ids"),
        ({"model": "other"}, Missing, "model"),
        ({"nonsense": 1}, BadRequest, "nonsense"),
    ],
    ids=str,
)
async def test_a_bad_request_is_refused_before_vllm(vllm_engine, body, error, param):
    progress = vllm_engine.progress
    with pytest.raises(error) as caught:
        await greedy(vllm_engine, **body)
    assert caught.value.param == param
    assert vllm_engine.progress == progress


async def test_what_vllm_itself_refuses_is_a_bad_request_and_hurts_no_other(fake, tiny, engine):
    speculating = await started_vllm(tiny, vllm_args={"speculative_config": {"method": "ngram"}})
    try:
        good, bad = await asyncio.gather(greedy(speculating), greedy(speculating, min_p=0.5), return_exceptions=True)
        assert good == await greedy(engine)
        assert isinstance(bad, BadRequest)
        assert "min_p" in bad.message
        assert "speculative" in bad.message
    finally:
        await speculating.stop()


async def test_errors_of_vllm_that_may_pass(fake, tiny, monkeypatch):
    small = await started_vllm(tiny, vllm_args={"max_num_queued_reqs": 1})
    try:
        with pytest.raises(Unavailable, match="busy"):
            await greedy(small, n=2, max_tokens=100)
        await eventually(lambda: not small._llm.running)  # the other one is aborted
        monkeypatch.setattr(small._llm, "model", None)
        with pytest.raises(Failed, match="TypeError"):
            await greedy(small, stop="x")
    finally:
        await small.stop()


async def test_fewer_log_probabilities_than_vllm_allows(fake, tiny):
    few = await started_vllm(tiny, vllm_args={"max_logprobs": 2})
    try:
        with pytest.raises(BadRequest, match="greater than max allowed: 2") as caught:
            await greedy(few, logprobs=3)
        assert caught.value.param == "logprobs"
    finally:
        await few.stop()


async def test_cancelling_a_call_aborts_all_its_sequences(vllm_engine):
    llm = vllm_engine._llm
    call = asyncio.create_task(greedy(vllm_engine, n=2, max_tokens=200))
    await eventually(lambda: len(llm.running) == 2)
    names = set(llm.running)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await eventually(lambda: not llm.running)
    assert names <= set(llm.aborted)
    assert (await greedy(vllm_engine))["choices"]


async def test_one_request_does_not_take_every_place(vllm_engine):
    llm = vllm_engine._llm
    assert vllm_engine.capacity == 10  # 8 and a quarter
    call = asyncio.create_task(greedy(vllm_engine, n=12, max_tokens=8))
    most = 0
    while not call.done():
        most = max(most, len(llm.running))
        await asyncio.sleep(0)
    assert len(call.result()["choices"]) == 12
    assert most == 2


async def test_progress_grows_while_a_sequence_runs(vllm_engine):
    before = vllm_engine.progress
    call = asyncio.create_task(greedy(vllm_engine, max_tokens=200))
    await eventually(lambda: vllm_engine.progress >= before + 3)
    assert not call.done()
    call.cancel()
