"""A stream that its sender cancels ends with 499 as its last message, after what came before."""

from talking import Talker, place, places, streaming_bench
from virtual_time import virtually
from worker_harness import bench, until, until_empty

from rejoinder.client.cancel import cancel, cancels_of


@virtually
async def test_a_cancelled_stream_ends_with_499() -> None:
    async with bench(Talker(), stream_interval_ms=60_000) as it:
        message_id = await it.send("a", options={"stream": True})
        engine = await streaming_bench(it, "b")
        await engine.begun("a")
        engine.say("a", 1)
        await it.responses_until(1)
        engine.say("a", 2)
        assert await cancel(cancels_of(requests=it.requests), [message_id]) == 1
        await until(lambda: engine.cancelled == ["a"])
        got = await it.responses_until(3)
        assert places(got[:2]) == [(1, 0, False), (2, 1, False)]
        assert (got[2]["status_code"], got[2]["stream"]) == (499, place(2, done=True, chunks=0))
        engine.say("a", "too late")
        engine.end("b")
        assert places((await it.responses_until(4))[3:]) == [(None, 0, True)]
        await until_empty(it)


@virtually
async def test_one_that_is_cancelled_before_it_began_ends_so_too() -> None:
    async with bench(Talker()) as it:
        engine = await streaming_bench(it, "a")
        await engine.begun("a")
        probe = await it.send("probe")
        await engine.begun("probe")
        await cancel(cancels_of(requests=it.requests), ["b", probe])
        await until(lambda: engine.cancelled == ["probe"])  # the marks have been seen
        await it.send("b", options={"stream": True, "inference_id": "b"})
        got = await it.responses_until(2)
        assert (got[1]["status_code"], got[1]["stream"]) == (499, place(0, done=True, chunks=0))
        engine.end("a")
        await it.responses_until(3)
