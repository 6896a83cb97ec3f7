"""What crosses between the worker and its engine process beside bodies: streams, headers, sizes, delays, classes."""

import asyncio

import pytest
from engine_harness import eventually
from host_harness import engine_process, request

from rejoinder.worker import errors
from rejoinder.worker.engines.child import visible
from rejoinder.worker.engines.protocol import WithHeaders

pytestmark = pytest.mark.usefixtures("own_children")


def stream(what, value, emit):
    asked = request(what, value)
    asked.emit = emit
    return asked


async def test_chunks_come_in_order_before_the_result_and_each_to_its_own_stream():
    async with engine_process() as engine:
        seen = [[] for _ in range(20)]
        calls = [engine.generate(stream("streams", [n] * n, seen[n].append)) for n in range(20)]
        ends = []
        for number, call in enumerate(calls):
            ends.append((await call, len(seen[number])))
        assert ends == [({"chunks": n}, n) for n in range(20)]
        assert seen == [[[at, n] for at in range(n)] for n in range(20)]


async def test_chunks_come_while_it_runs_and_none_after_it_was_cancelled():
    async with engine_process() as engine:
        seen = []
        call = asyncio.create_task(engine.generate(stream("streams_for_ever", "x", seen.append)))
        await eventually(lambda: len(seen) > 5)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        count = len(seen)
        await eventually(lambda: not list(engine._child._calls))  # it has said that it ended
        assert len(seen) == count
        assert await engine.generate(request("was_cancelled")) == ["x"]


async def test_a_request_is_a_stream_only_where_one_is_asked_for():
    async with engine_process() as engine:
        assert await engine.generate(request("has_emit")) is False
        assert await engine.generate(stream("has_emit", None, print)) is True


async def test_a_chunk_that_cannot_be_sent_ends_its_stream_alone():
    async with engine_process() as engine:
        seen = []
        with pytest.raises(errors.NotGiven, match="a chunk of the stream cannot be sent: not a JSON value"):
            await engine.generate(stream("streams_object", None, seen.append))
        assert await engine.generate(request("echo", 1)) == 1
        assert seen == []


async def test_whoever_takes_the_chunks_may_refuse_them():
    """Its error is the answer, the work is stopped, and neighbours and process live."""

    def refuse(chunk):
        raise errors.NotGiven(f"no room for {chunk}")

    async with engine_process() as engine:
        pid = await engine.generate(request("pid"))
        with pytest.raises(errors.NotGiven, match="no room for 0"):
            await engine.generate(stream("streams_for_ever", "mine", refuse))
        await eventually(lambda: not list(engine._child._calls))
        assert await engine.generate(request("was_cancelled")) == ["mine"]
        assert await engine.generate(request("pid")) == pid


async def test_headers_cross_both_ways():
    async with engine_process() as engine:
        headers = {"Content-Type": "image/png", "X-Amzn-SageMaker-Custom-Attributes": "ä\nb"}
        asked = request("headers", "body")
        asked.headers = headers
        assert await engine.generate(asked) == WithHeaders("body", headers)
        assert await engine.generate(request("headers", "body")) == WithHeaders("body", {"none": "given"})


@pytest.mark.parametrize("length", [0, 10, 1_000_000])
async def test_the_size_is_that_of_the_body_about(length):
    async with engine_process() as engine:
        size = await engine.generate(request("size", "x" * length))
        assert length < size < length + 200


async def test_sizes_of_requests_that_arrive_together_are_their_own():
    async with engine_process() as engine:
        sizes = await asyncio.gather(*[engine.generate(request("size", "x" * 1000 * n)) for n in range(50)])
        assert [size // 1000 for size in sizes] == list(range(50))


@pytest.mark.parametrize("delay", [None, 0, 7.5])
async def test_a_delay_crosses(delay):
    async with engine_process() as engine:
        with pytest.raises(errors.RetryableError) as caught:
            await engine.generate(request("raises_delay", delay))
        assert type(caught.value) is errors.RetryableError
        assert caught.value.delay == delay


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("Busy", errors.RetryableError, "come back"),
        ("TooLong", errors.RequestTooLarge, "no"),
        ("Odd", errors.BadRequest, "{'not': 'a text'}"),
        ("Silent", errors.Unavailable, ""),
    ],
)
async def test_somebody_s_own_error_is_its_nearest_parent(name, kind, message):
    async with engine_process() as engine:
        with pytest.raises(kind) as caught:
            await engine.generate(request("raises_own", name))
        assert type(caught.value) is kind
        assert caught.value.message == message
        assert getattr(caught.value, "delay", None) is None
        assert await engine.generate(request("echo", 1)) == 1


async def test_an_engine_that_cancels_a_request_itself_has_failed_on_it():
    async with engine_process() as engine:
        with pytest.raises(errors.Failed, match="CancelledError"):
            await engine.generate(request("cancels_itself"))
        assert await engine.generate(request("echo", 1)) == 1


async def test_one_device_is_visible_and_the_factory_does_not_know(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, 5 ,7,-1,9")
    async with engine_process(visible_device=2) as engine:
        assert await engine.generate(request("environment", "CUDA_VISIBLE_DEVICES")) == "7"
        assert await engine.generate(request("configured")) == []
    async with engine_process() as engine:
        assert await engine.generate(request("environment", "CUDA_VISIBLE_DEVICES")) == "GPU-a, 5 ,7,-1,9"
    with pytest.raises(errors.EngineGone, match="no device cuda:3: CUDA_VISIBLE_DEVICES=GPU-a, 5 ,7,-1,9 leaves 3"):
        async with engine_process(visible_device=3):
            pass


@pytest.mark.parametrize(("device", "mask", "left"), [(0, None, "0"), (3, None, "3"), (0, "4", "4"), (1, "a,b", "b")])
def test_which_device_is_visible(device, mask, left):
    assert visible(device, mask) == left
