"""A tiny random model for what can go wrong, and the demo's real model for what must be right."""

from pathlib import Path

import pytest
import pytest_asyncio
from children import begin_test
from engine_harness import build_tiny, forget_vllm, started
from static_harness import ROWS
from vllm_harness import started_vllm

from rejoinder.worker.engines.transformers.static import StaticBatch


@pytest.fixture
def own_children():
    """What `children` counts is what this test has started."""
    begin_test()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tiny):
    """The engine in this process with the tiny model, for a module's tests."""
    engine = await started(tiny)
    yield engine
    await engine.stop()


@pytest.fixture(scope="session")
def models(tmp_path_factory, tiny):
    others = {family: build_tiny(tmp_path_factory.mktemp(family), family=family) for family in ("t5", "mamba")}
    return {"llama": tiny, **others}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["llama", "t5", "mamba"])
async def static(request, models):
    engine = await started(models[request.param], batching="static" if request.param == "llama" else "auto", **ROWS)
    assert isinstance(engine._batch, StaticBatch)
    yield engine
    await engine.stop()


@pytest.fixture(scope="module")
def fake():
    """The fake of vLLM can be imported, here and in processes that are started with this path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent / "fake_vllm")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")  # the engine sets it: this takes it back
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        forget_vllm()
        import vllm

        yield vllm
    forget_vllm()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm_engine(fake, tiny):
    engine = await started_vllm(tiny)
    yield engine
    await engine.stop()


@pytest.fixture(scope="session")
def smollm2():
    """The directory of the demo's model, converted on first use."""
    from rejoinder.worker.engines.smollm2 import ensure
    from rejoinder.worker.settings import user_cache_dir

    return ensure(user_cache_dir())


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def real(smollm2):
    """The real model in a process of its own, once for all tests."""
    from rejoinder.worker.engines.host import EngineProcess

    config = {"model": str(smollm2), "served_names": ["smollm2", "alias"], "threads": 2, "cache_bytes": 2**28}
    process = EngineProcess("rejoinder.worker.engines.transformers.engine:create", config)
    await process.start()
    yield process
    await process.stop()
