"""The vLLM engine against the fake of vLLM: how it starts, stops and dies, and the settings that it takes."""

import asyncio
import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest
from engine_harness import eventually, forget_vllm
from vllm_harness import greedy, started_vllm

from rejoinder.worker.engines.factory import VLLM_FACTORY, create_engine, vllm_config
from rejoinder.worker.engines.host import EngineProcess, HostSettings
from rejoinder.worker.errors import EngineGone, Unavailable
from rejoinder.worker.settings import Settings, SettingsError, resolve

pytestmark = pytest.mark.asyncio(loop_scope="module")


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
        ({"vllm_args": "[]"}, "vllm_args .from flag. is .*: it should be a JSON object"),
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
