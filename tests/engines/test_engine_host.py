"""The engine process: whatever an engine does to its process, the worker gets an answer and its loop goes on."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from children import children
from engine_harness import eventually
from host_harness import QUICK, engine_process, request, running

from rejoinder.worker import errors
from rejoinder.worker.engines.host import EngineProcess, HostSettings

pytestmark = pytest.mark.usefixtures("own_children")


async def test_paths_capacity_and_results_cross():
    async with engine_process() as engine:
        assert engine.paths == {"/do"}
        assert engine.capacity == 7
        value = {"n": 10**5000, "s": "\ud800 \ufffe", "f": 0.1, "l": [None, True]}
        assert await engine.generate(request("echo", value)) == value
        await eventually(lambda: engine.progress == 1)


async def test_many_at_once_are_resolved_by_id():
    async with engine_process() as engine:
        got = await asyncio.gather(*[engine.generate(request("echo", n)) for n in range(2000)])
        assert got == list(range(2000))


async def test_errors_cross_by_kind():
    async with engine_process() as engine:
        for name in ("BadRequest", "Missing", "RequestTooLarge", "Failed", "Unavailable"):
            with pytest.raises(errors.RequestError) as caught:
                await engine.generate(request("raises", name))
            assert type(caught.value) is getattr(errors, name)
            assert caught.value.message == "no"
            if name == "BadRequest":
                assert (caught.value.param, caught.value.code) == ("x", "c")


async def test_an_unexpected_exception_is_failed_in_one_line_and_harms_nobody(capfd):
    async with engine_process() as engine:
        (neighbour,) = await running(engine, "n")
        with pytest.raises(errors.Failed) as caught:
            await engine.generate(request("crashes", "a prompt\nsecond line"))
        assert caught.value.message == "the engine failed on this request: RuntimeError"
        with pytest.raises(errors.Failed, match="cannot be sent"):
            await engine.generate(request("returns_object"))
        assert not neighbour.done()
        neighbour.cancel()
    out, err = capfd.readouterr()
    assert out == ""
    assert "what is printed goes to the log" in err
    assert err.count("Traceback") == 2
    for part in ("misbehaving.py", "in crashes", "builtins.ValueError", "builtins.RuntimeError"):
        assert part in err
    assert "a prompt" not in err
    assert "second line" not in err


async def test_debugging_shows_an_exceptions_message_in_the_log_alone(capfd):
    async with engine_process(debug=True) as engine:
        with pytest.raises(errors.Failed) as caught:
            await engine.generate(request("crashes", "a prompt"))
        assert caught.value.message == "the engine failed on this request: RuntimeError"
    assert "RuntimeError: a prompt" in capfd.readouterr().err


async def test_cancelling_reaches_the_engine():
    async with engine_process() as engine:
        tasks = await running(engine, "a", "b")
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        assert await engine.generate(request("was_cancelled")) == ["a"]
        tasks[1].cancel()


async def test_signals_are_the_workers_to_handle():
    async with engine_process() as engine:
        pid = await engine.generate(request("pid"))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
            assert await engine.generate(request("signals_group", number)) == "alive"
        assert os.getsid(pid) != os.getsid(0)
        assert await engine.generate(request("pid")) == pid


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"load_error": "no such model; give --model a directory"}, "no such model; give --model a directory"),
        ({"load_crash": True}, "RuntimeError: weights are upside down"),
        ({"load_seconds": 30}, "not ready after 1 s"),
    ],
)
async def test_a_failing_start_says_why(config, message):
    engine = EngineProcess(
        "misbehaving:create", config, HostSettings(start_seconds=1 if "load_seconds" in config else 120)
    )
    with pytest.raises(errors.EngineGone) as caught:
        await engine.start()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not children()
    await engine.stop()


@pytest.mark.parametrize("factory", ["no_such_module:create", "misbehaving:nothing"])
async def test_an_unknown_factory_is_said(factory):
    with pytest.raises(errors.EngineGone, match="there is no engine"):
        await EngineProcess(factory, {}, QUICK).start()


async def test_stop_is_idempotent_and_ends_what_runs():
    engine = EngineProcess("misbehaving:create", {}, QUICK)
    await engine.start()
    (call,) = await running(engine, "n")
    await engine.stop()
    with pytest.raises(errors.Unavailable, match="stopped"):
        await call
    with pytest.raises(errors.Unavailable):
        await engine.generate(request("echo", 1))
    await engine.stop()


async def test_an_engine_that_does_not_stop_is_killed():
    engine = EngineProcess("misbehaving:create", {"stop_hangs": True}, HostSettings(stop_seconds=0.5))
    await engine.start()
    process = engine._child._process
    await engine.stop()
    assert process.returncode == -signal.SIGKILL


PARENT = """
import asyncio, sys
from rejoinder.worker.engines.host import EngineProcess
from rejoinder.worker.engines.protocol import EngineRequest
async def main():
    engine = EngineProcess("misbehaving:create", {})
    await engine.start()
    print(await engine.generate(EngineRequest("/do", {"pid": None}, "r", 1)), flush=True)
    await engine.generate(EngineRequest("/do", {sys.argv[1]: 60}, "r", 1))
asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal of a parent is Linux's")
@pytest.mark.parametrize("what", ["waits", "holds_gil"])
def test_the_process_dies_with_its_worker(what):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, what],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        assert child.wait(timeout=60) in (0, 1, None, -signal.SIGKILL)


def test_the_host_imports_no_torch():
    code = (
        "import sys, rejoinder.worker.engines.host; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
