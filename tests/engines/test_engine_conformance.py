"""What `worker/engines/protocol.py` promises, of every engine."""

import asyncio
import contextlib
import json
import threading

import pytest
import pytest_asyncio
from children import begin_test, children
from engine_conformance import MODELS, SUBJECTS
from engine_harness import eventually
from needs import able, needs

from rejoinder.worker.engines.protocol import EngineRequest
from rejoinder.worker.errors import Missing, Unavailable

pytestmark = pytest.mark.asyncio(loop_scope="module")

NEIGHBOURS = 16
LONG = 10
"""So many times as much as runs at once."""


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return {family: str(build(tmp_path_factory.mktemp(family))) for family, build in MODELS.items()}.__getitem__


def pytest_generate_tests(metafunc):
    if "subject" in metafunc.fixturenames:
        subjects = able(metafunc, SUBJECTS)
        metafunc.parametrize("subject", subjects, ids=lambda one: one.name, indirect=True, scope="module")


@pytest.fixture(scope="module")
def subject(request):
    """Every engine that has what the test `needs`, one after the other."""
    if request.param.fixture:
        request.getfixturevalue(request.param.fixture)
    return request.param


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(subject, model):
    begin_test()  # only its own processes are killed
    engine = subject.build(model)
    await engine.start()
    yield engine
    await engine.stop()


@contextlib.asynccontextmanager
async def leaving_nothing():
    """No thread, task or process more at the end than at the beginning."""
    threads, tasks = set(threading.enumerate()), asyncio.all_tasks()
    before = children()
    yield

    def more():
        # asyncio's own pool is the event loop's.
        return {t for t in threading.enumerate() if not t.name.startswith("asyncio_")} - threads

    with contextlib.suppress(TimeoutError):
        await eventually(lambda: not more())
    assert not more()
    assert asyncio.all_tasks() <= tasks | {asyncio.current_task()}
    await eventually(lambda: children() <= before)


def long_calls(engine, subject):
    """Work for several seconds: the test sees it in its midst, however late it looks."""
    return [asyncio.create_task(engine.generate(subject.long(i))) for i in range(LONG * engine.capacity)]


def bodies(engine, requests):
    return asyncio.gather(*map(engine.generate, requests))


async def test_its_life_and_that_stopping_ends_what_runs(subject, model):
    async with leaving_nothing():
        engine = subject.build(model)
        assert engine.capacity == 0
        with pytest.raises(Unavailable):
            await engine.generate(subject.good(0))
        await engine.start()
        gone = asyncio.create_task(engine.wait_gone())
        assert engine.capacity > 0
        await engine.generate(subject.good(0))
        assert not gone.done()
        calls, before = [], engine.progress
        if subject.long is not None:
            calls = long_calls(engine, subject)
            await eventually(lambda: engine.progress > before)
        await engine.stop()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        failed = {type(outcome) for outcome in outcomes if isinstance(outcome, BaseException)}
        assert failed == ({Unavailable} if calls else set())
        assert engine.capacity == 0
        with pytest.raises(Unavailable):
            await engine.generate(subject.good(0))
        await engine.stop()
        assert not gone.done()
        gone.cancel()
        await asyncio.wait({gone})


async def test_paths(engine, subject):
    assert {subject.good(i).path for i in range(NEIGHBOURS)} <= engine.paths
    with pytest.raises(Missing):
        await engine.generate(EngineRequest("/v1/nothing", {}, "r", 1))


async def test_progress_grows_with_work(engine, subject):
    before = engine.progress
    await engine.generate(subject.good(1))
    await eventually(lambda: engine.progress > before)


async def test_the_same_request_has_the_same_body_in_any_company(engine, subject):
    requests = [subject.good(i) for i in range(NEIGHBOURS)]
    alone = [await engine.generate(request) for request in requests]
    assert subject.same(await engine.generate(requests[0]), alone[0])
    assert all(map(subject.same, await bodies(engine, requests), alone))
    assert all(map(subject.same, await bodies(engine, requests[::-1]), alone[::-1]))
    assert len({json.dumps(body) for body in alone}) == NEIGHBOURS
    for request, body in zip(requests, alone, strict=True):
        assert json.loads(json.dumps(body)) == body
        if request.path in subject.shapes:
            subject.shapes[request.path].model_validate(body, strict=True)


@needs("bad")
async def test_a_bad_request_has_its_own_error_and_harms_no_neighbour(engine, subject):
    good = [subject.good(i) for i in range(len(subject.bad))]
    want = await bodies(engine, good)
    mixed = [request for pair in zip(good, [bad.request for bad in subject.bad], strict=True) for request in pair]
    outcomes = await asyncio.gather(*map(engine.generate, mixed), return_exceptions=True)
    assert all(map(subject.same, outcomes[::2], want))
    for bad, error in zip(subject.bad, outcomes[1::2], strict=True):
        assert type(error) is bad.error, (bad.request.body, error)
        assert error.param == bad.param
        assert error.message
    assert engine.capacity > 0


async def test_more_than_its_capacity_is_answered(engine, subject):
    requests = [subject.good(i) for i in range(engine.capacity + NEIGHBOURS)]
    assert len(await bodies(engine, requests)) == len(requests)


@needs("long")
async def test_cancelling_stops_the_work_and_frees_its_place(engine, subject):
    capacity, before = engine.capacity, engine.progress
    calls = long_calls(engine, subject)
    await eventually(lambda: engine.progress > before)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    assert any(call.cancelled() for call in calls)
    requests = [subject.good(i) for i in range(capacity)]
    assert len(await bodies(engine, requests)) == capacity
    assert engine.capacity > 0
    # All that is left of the cancelled ones would be many thousands of steps.
    assert engine.progress - before < 200 * capacity


@needs("process")
async def test_a_killed_process_is_unavailable_and_comes_back(engine, subject):
    want = await engine.generate(subject.good(0))
    calls = long_calls(engine, subject)
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)  # they run, and most have not begun
    for child in children():
        child.kill()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert failed
    assert {type(error) for error in failed} == {Unavailable}
    await eventually(lambda: engine.capacity > 0, seconds=120)
    assert await engine.generate(subject.good(0)) == want
