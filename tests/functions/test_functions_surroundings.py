"""What an app finds around it: modules of the same names, signals, its output, and the limits of its process."""

import asyncio
import contextlib
import logging
import sys

import pytest
from engine_harness import eventually
from function_apps import FUNCTIONS_FACTORY, ask, config, in_process, serving

from rejoinder.worker.engines.factory import create_engine, create_functions
from rejoinder.worker.engines.host import EngineProcess, HostSettings
from rejoinder.worker.errors import EngineGone
from rejoinder.worker.settings import resolve

ONE = "from rejoinder.worker.functions import generate\n"


@contextlib.asynccontextmanager
async def of_files(folder, app, **files):
    """An app of several files, by their paths with `__` for `/`, in a process of its own."""
    for name, source in files.items():
        file = folder / (name.replace("__", "/") + ".py")
        file.parent.mkdir(exist_ok=True)
        file.write_text(source)
    engine = EngineProcess(FUNCTIONS_FACTORY, config(folder, app, linger=True), HostSettings(start_seconds=60))
    try:
        await engine.start()
        yield engine
    finally:
        await engine.stop()


async def test_modules_may_have_the_names_of_ours(tmp_path):
    source = ONE + "from schemas import limit\n@generate\ndef one(body): return [limit, __name__]\n"
    async with of_files(tmp_path, "worker", worker=source, schemas="limit = 5", adapters="1 / 0") as engine:
        assert await ask(engine) == [5, "worker"]


async def test_a_package_may_import_relative_to_itself(tmp_path):
    source = ONE + "from . import words\nfrom .deep.er import more\n@generate\ndef one(body): return words.w + more\n"
    files = {"pkg__app": source, "pkg__words": "w = 'a'", "pkg__deep__er": "more = 'b'"}
    (tmp_path / "pkg" / "deep").mkdir(parents=True)
    async with of_files(tmp_path, "pkg.app", **files) as engine:
        assert await ask(engine) == "ab"


@pytest.mark.parametrize("name", ["calendar", "time", "structlog", "rejoinder"])
async def test_a_module_that_another_hides_is_refused_by_name(tmp_path, name):
    with pytest.raises(EngineGone, match=f"'{name}' is .*, and hides the one in .*: rename yours"):
        async with of_files(tmp_path, name, **{name: ONE + "@generate\ndef one(body): return 1\n"}):
            pass


async def test_a_module_may_be_a_link_or_installed(tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "elsewhere.py").write_text(ONE + "@generate\ndef one(body): return 1\n")
    (tmp_path / "app" / "linked_app.py").symlink_to(tmp_path / "elsewhere.py")
    async with of_files(tmp_path / "app", "linked_app") as engine:
        assert await ask(engine) == 1
    with pytest.raises(EngineGone, match="nothing in module 'calendar' is marked"):
        async with of_files(tmp_path / "app", "calendar"):
            pass


async def test_a_module_is_read_anew_by_the_next_process(tmp_path):
    source = ONE + "import os\n@generate\ndef one(body): return os._exit(1) if body else 'first'\n"
    async with of_files(tmp_path, "changing", changing=source) as engine:
        assert await ask(engine) == "first"
        (tmp_path / "changing.py").write_text(source.replace("first", "the second"))
        with contextlib.suppress(Exception):
            await ask(engine, 1)
        await eventually(lambda: engine.capacity > 0)
        assert await ask(engine) == "the second"


async def test_what_an_app_starts_can_be_ended_by_a_signal(tmp_path):
    source = """
        import os, signal, subprocess, time
        @generate
        def one(body):
            started = subprocess.Popen(["sleep", "600"])
            started.terminate()
            return started.wait(20)
        @generate("/forked")
        def forked(body):
            ready, say = os.pipe()
            if not (pid := os.fork()):
                os.write(say, b"1")
                time.sleep(60)
                os._exit(0)
            os.read(ready, 1)  # before that it may still have its parent's handlers
            os.kill(pid, signal.SIGTERM)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        @generate("/itself")
        def itself(body):
            os.kill(os.getpid(), signal.SIGTERM)
            return "alive"
    """
    async with in_process(tmp_path, source) as engine, asyncio.timeout(60):
        assert await ask(engine) == -15
        assert await ask(engine, path="/forked") == -15
        assert await ask(engine, path="/itself") == "alive"


async def test_a_proxy_among_the_names_of_a_module_is_none_of_our_business(tmp_path):
    source = """
        class Proxy:
            def __call__(self): pass
            def __getattr__(self, name): raise RuntimeError("nothing behind it yet")
        proxy = Proxy()
        @generate
        def one(body): return 1
    """
    async with serving(tmp_path, source) as engine:
        assert await ask(engine) == 1


async def test_a_long_call_is_no_hang_however_short_a_hang_is(tmp_path):
    settings = HostSettings(start_seconds=60, hang_seconds=3)
    (tmp_path / "patient.py").write_text(ONE + "import time\n@generate\ndef one(body): return time.sleep(5)\n")
    engine = EngineProcess(FUNCTIONS_FACTORY, config(tmp_path, "patient", linger=True), settings)
    await engine.start()
    try:
        assert await ask(engine) is None
    finally:
        await engine.stop()


async def test_the_bytes_of_a_batch_are_measured_where_nobody_has(tmp_path):
    source = """
        @generate_batch(max_batch_size=8, max_batch_bytes=2500)
        def many(bodies): return [len(bodies)] * len(bodies)
    """
    async with serving(tmp_path, source, max_wait_ms=100) as engine:
        assert await asyncio.gather(*(ask(engine, "x" * 1000) for _ in range(4))) == [2] * 4
        assert await asyncio.gather(*(ask(engine, "x" * 1000, size=1) for _ in range(4))) == [4] * 4
        assert await ask(engine, 10**5000) == 1


async def test_a_sync_generator_does_not_run_away_from_the_event_loop(tmp_path):
    source = """
        made = []
        @generate_stream
        def stream(body):
            for number in range(20000):
                made.append(number)
                yield number
        @generate("/made")
        async def told(body): return len(made)
    """
    async with serving(tmp_path, source) as engine:
        chunks, ahead = [], []

        def emit(chunk):
            chunks.append(chunk)
            ahead.append(sys.modules[engine._config["app"]].made[-1] - chunk)

        await ask(engine, emit=emit)
        assert chunks == list(range(20000))
        assert max(ahead) <= 1001


async def test_the_apps_loggers_are_heard_in_the_workers_own_process_too(tmp_path):
    flags = {"requests": "memory://a", "responses": "memory://b", "app": "heard_app:one", "app_dir": tmp_path}
    for process in (True, False):
        settings = resolve({**flags, "log_level": "info", "engine_process": process}, environ={}).settings
        logging.getLogger("heard_app").setLevel(logging.NOTSET)
        engine = create_engine(settings)
        if isinstance(engine, EngineProcess):
            own = {name: value for name, value in engine._config.items() if name != "logs"}
            await create_functions(own).stop()
        assert logging.getLogger("heard_app").level == logging.INFO
