"""The vLLM engine against a fake of vLLM (`fake_vllm/vllm.py`): vLLM needs a GPU, and the torch and transformers that
it pins exclude those of the other engine. What these tests show is the adapter: what it asks of `AsyncLLM`, and what it
makes of its answers, errors and death. That vLLM itself answers as the fake does, they cannot show.
"""

import asyncio
import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest
import pytest_asyncio
from engine_harness import CONTEXT, GREEDY, build_tiny, chat, completion, eventually, forget_vllm
from openai.types import Completion
from openai.types.chat import ChatCompletion

from rejoinder.worker.engines.factory import VLLM_FACTORY, create_engine, create_vllm, vllm_config
from rejoinder.worker.engines.host import EngineProcess, HostSettings
from rejoinder.worker.errors import BadRequest, EngineGone, Failed, Missing, RequestTooLarge, Unavailable
from rejoinder.worker.settings import Settings, SettingsError, resolve

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def started_vllm(model, **config):
    engine = create_vllm({"model": str(model), "max_running": 8, **config})
    await engine.start()
    return engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm_engine(fake, tiny):
    engine = await started_vllm(tiny)
    yield engine
    await engine.stop()


async def greedy(engine, **body):
    return await engine.generate(completion({**GREEDY, **body}))


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


async def test_the_death_of_vllms_processes_is_the_engines(fake, tiny):
    dying = await started_vllm(tiny)
    gone = asyncio.create_task(dying.wait_gone())
    calls = [asyncio.create_task(greedy(dying, max_tokens=200)) for _ in range(2)]
    await eventually(lambda: len(dying._llm.running) == 2)
    assert not gone.done()
    dying._llm.core.kill()
    for call in calls:
        with pytest.raises(Unavailable, match="EngineDeadError"):
            await call
    async with asyncio.timeout(20):
        await gone
    assert dying.capacity == 0
    with pytest.raises(Unavailable):
        await greedy(dying)
    await dying.stop()


async def test_stopping_ends_calls_and_processes(fake, tiny):
    stopping = await started_vllm(tiny)
    call = asyncio.create_task(greedy(stopping, max_tokens=200))
    await eventually(lambda: stopping._llm.running)
    await stopping.stop()
    with pytest.raises(Unavailable, match="stopped"):
        await call
    assert stopping._llm.core.poll() is not None
    await stopping.stop()
    with pytest.raises(Unavailable):
        await greedy(stopping)


async def test_stopping_ends_a_call_whose_prompt_is_being_read(fake, tiny, monkeypatch):
    stopping = await started_vllm(tiny)
    reading, read_on, encode = threading.Event(), threading.Event(), stopping._text.encode

    def slow(prompt):
        reading.set()
        assert read_on.wait(20)
        return encode(prompt)

    monkeypatch.setattr(stopping._text, "encode", slow)
    call = asyncio.create_task(greedy(stopping))
    await eventually(reading.is_set)
    await stopping.stop()
    read_on.set()
    with pytest.raises(Unavailable, match="stopped"):
        await call
    assert not stopping._llm.running


GUARDING = "from rejoinder.worker.engines import guard; it = guard.start(); print(it is not None)"


@pytest.mark.parametrize(("led", "guarded"), [({"start_new_session": True}, True), ({"process_group": 0}, False)])
async def test_a_guard_only_where_the_group_is_our_own(led, guarded):
    """A shell gives its pipelines a group each, and `rejoinder worker | tee log` leads one."""
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", GUARDING], capture_output=True, text=True, timeout=60, **led
    )
    assert done.stdout.split() == [str(guarded)]


def cores(pid):
    return [child for child in psutil.Process(pid).children(recursive=True) if child.name() == "sleep"]


@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_in_an_engine_process_whose_end_is_the_end_of_vllms(fake, tiny, engine, how):
    host = EngineProcess(
        VLLM_FACTORY, {"model": str(tiny), "max_running": 8}, HostSettings(stop_seconds=10, restart_backoff=0.05)
    )
    await host.start()
    try:
        assert await greedy(host) == await greedy(engine)
        pid = host._child._process.pid
        (core,) = cores(pid)
        if how == "killed":
            os.kill(pid, signal.SIGKILL)
    finally:
        if how == "stopped":
            await host.stop()
        await eventually(lambda: not core.is_running() or core.status() == psutil.STATUS_ZOMBIE)
        await host.stop()


async def test_settings_become_arguments(fake, tiny):
    flags = {
        "requests": "memory://a", "responses": "memory://b", "engine": "vllm", "model": str(tiny), "revision": "abc",
        "max_model_len": 128, "max_running": 4, "max_batch_tokens": 64, "cache_bytes": 2**20, "dtype": "float32",
        "served_model_name": "one, two", "vllm_args": '{"gpu_memory_utilization": 0.5}', "engine_process": False,
    }  # fmt: skip
    settings = resolve(flags, {}).settings
    engine = create_engine(settings)
    assert vllm_config(settings)["vllm_args"] == {"gpu_memory_utilization": 0.5}
    await engine.start()
    await engine.stop()
    assert fake.AsyncLLM.args[-1] == fake.AsyncEngineArgs(
        model=str(tiny), revision="abc", tokenizer_revision="abc", dtype="float32", load_format="safetensors",
        max_model_len=128, max_num_seqs=4, max_num_batched_tokens=64, kv_cache_memory_bytes=2**20,
        gpu_memory_utilization=0.5, disable_log_stats=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"vllm_args": "{"}, "vllm_args .from flag. is '{': it should be a JSON object"),
        ({"vllm_args": "[]"}, "vllm_args .from flag. is .*: it should be a valid dictionary"),
        ({"vllm_args": {"max_num_seqs": 3}}, "'max_num_seqs', which is the worker's setting max_running"),
        ({"engine": "transformers", "vllm_args": {"x": 1}}, "vllm_args has a meaning only with engine vllm"),
        ({"device": "cuda:1"}, "device has no meaning with engine vllm"),
        ({"threads": 2}, "threads has no meaning with engine vllm"),
        ({"task": "embed", "lora": "x"}, "task, lora has no meaning with engine vllm"),
        ({"offline": True}, "offline has no meaning with engine vllm"),
        ({"tokenizer": "x"}, "tokenizer has no meaning with engine vllm"),
        ({"quantization": {"quant_method": "fp8"}}, "quantization has no meaning with engine vllm"),
        ({"model": None}, "model is missing"),
    ],
)
async def test_settings_that_cannot_be(flags, message):
    given = {"requests": "memory://a", "responses": "memory://b", "engine": "vllm", "model": "m", **flags}
    with pytest.raises(SettingsError, match=message):
        resolve(given, {})


async def test_a_table_of_arguments_in_the_file(tmp_path):
    file = tmp_path / "it.toml"
    file.write_text('engine = "vllm"\nmodel = "m"\n[vllm_args]\nenforce_eager = true\n')
    settings = resolve({"requests": "memory://a", "responses": "memory://b"}, {}, file).settings
    assert settings.vllm_args == {"enforce_eager": True}


async def test_what_vllm_cannot_start_is_said_in_one_line(fake, tiny, tmp_path):
    with pytest.raises(EngineGone, match=r"cannot run the model .* unexpected keyword argument 'nonsense'") as caught:
        await started_vllm(tiny, vllm_args={"nonsense": 1})
    assert "\n" not in str(caught.value)
    with pytest.raises(EngineGone, match="cannot run the model"):
        await started_vllm(tmp_path / "absent")
    with pytest.raises(EngineGone, match="smollm2 is packaged for engine transformers"):
        await started_vllm("smollm2")


async def test_without_vllm_the_worker_says_what_to_install(tiny, monkeypatch):
    forget_vllm()
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.endswith("fake_vllm")])
    settings = Settings(requests="memory://a", responses="memory://b", engine="vllm", model=str(tiny))
    host = create_engine(settings)
    with pytest.raises(
        EngineGone, match=r"vLLM is not installed: .*environment of its own.*rejoinder\[vllm\]"
    ) as caught:
        await host.start()
    assert "\n" not in str(caught.value)
