"""Jobs of JSON lines: every line is answered in its place, and nothing of a job outlives it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from worker_harness import Bench, GateEngine, bench, flaky, until, until_backlog, until_empty

from rejoinder.adapters import Blob, Transient
from rejoinder.adapters.file_store import FileStore
from rejoinder.schemas.envelope import Beside, write_response
from rejoinder.worker.errors import BadRequest, EngineGone, Unavailable


@contextlib.asynccontextmanager
async def line_bench(
    tmp_path: Path, capacity: int = 4, *, is_open: bool = True, **settings: Any
) -> AsyncIterator[Bench]:
    engine = GateEngine(capacity)
    engine.open = is_open
    settings = {"blobs": f"file://{tmp_path}", **settings}
    async with bench(engine, **settings) as it:
        yield it


async def send_lines(it: Bench, tmp_path: Path, data: bytes, **fields: Any) -> None:
    (tmp_path / "in.jsonl").write_bytes(data)
    envelope = {"path": "/run", "metadata": {"n": 1}, "input_location": f"file://{tmp_path}/in.jsonl", **fields}
    await it.send_raw(json.dumps(envelope).encode())


async def lines_of(it: Bench, tmp_path: Path) -> list[dict[str, Any]]:
    """The output's lines, once the response has come."""
    (response,) = await it.responses_until(1)
    assert {key: response[key] for key in ("status_code", "metadata", "body")} == {
        "status_code": 200,
        "metadata": {"n": 1},
        "body": None,
    }
    (_, message) = it.got[0]
    location = f"file://{tmp_path}/outputs/{message.attributes['response_id']}.out"
    assert response["output_location"] == location
    data = Path(location.removeprefix("file://")).read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def ran(body: Any) -> dict[str, Any]:
    return {"status_code": 200, "body": {"ran": body}}


def unfinished(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]


async def test_lines_are_answered_in_their_order(tmp_path: Path) -> None:
    bodies: list[Any] = [{"n": n, "text": "é\u2028" * n} for n in range(200)] + [None, "x", 2**80, [], 0]
    async with line_bench(tmp_path) as it:
        data = "\r\n\n  \n".join(json.dumps(body, ensure_ascii=False) for body in bodies)
        await send_lines(it, tmp_path, data.encode())  # the last line has no end
        assert await lines_of(it, tmp_path) == [ran(body) for body in bodies]
        await until_empty(it)


async def test_results_keep_their_order_however_they_come(tmp_path: Path) -> None:
    async with line_bench(tmp_path, capacity=3, is_open=False) as it:
        await send_lines(it, tmp_path, b"0\n1\n2\n3\n4\n")
        for turn in ([0, 1, 2], [0, 1, 3], [0, 1, 4]):
            await until(lambda turn=turn: sorted(map(int, it.engine.running)) == turn)
            it.engine.release(turn[-1])
        await until(lambda: sorted(map(int, it.engine.running)) == [0, 1])
        it.engine.release(1)
        it.engine.release(0)
        assert await lines_of(it, tmp_path) == [ran(n) for n in range(5)]


async def test_a_bad_line_is_an_error_in_its_place(tmp_path: Path) -> None:
    lines = [b'"fine"', b'{"cut": ', b"\xff", b'{"a": 1, "a": 2}', b"NaN", b'"' + b"x" * 2000 + b'"', b'"no"', b'"bug"']
    async with line_bench(tmp_path, max_request_bytes=1000, max_attempts=2) as it:
        it.engine.errors = {"no": [BadRequest("not this", param="body")], "bug": [ValueError("secret")] * 2}
        await send_lines(it, tmp_path, b"\n".join([*lines, b'"last"']))
        got = await lines_of(it, tmp_path)
        assert [line["status_code"] for line in got] == [200, 400, 400, 400, 400, 413, 400, 500, 200]
        messages = [line["body"]["error"]["message"] for line in got[1:8]]
        assert [message.partition(" is")[0] for message in messages[:2]] == ["line 2", "line 3"]
        assert "duplicate key" in messages[2]
        assert "more than 1000 bytes" in messages[4]
        assert messages[5:] == ["not this", "the engine failed on this request: ValueError"]
        assert got[-1] == ran("last")


async def test_a_line_is_tried_again_in_its_place(tmp_path: Path) -> None:
    async with line_bench(tmp_path, max_attempts=3, retry_delay_seconds=0.01) as it:
        it.engine.errors = {"a": [Unavailable("away")] * 2, "b": [Unavailable("away")] * 3}
        await send_lines(it, tmp_path, b'"a"\n"b"\n"c"')
        got = await lines_of(it, tmp_path)
        assert [line["status_code"] for line in got] == [200, 503, 200]
        assert [it.engine.started.count(body) for body in "abc"] == [3, 3, 1]
        assert it.got[0][1].attributes["attempt"] == "1", "the job itself was not"


async def test_a_line_past_its_time_is_504(tmp_path: Path) -> None:
    async with line_bench(tmp_path, is_open=False) as it:
        await send_lines(it, tmp_path, b'"a"\n"b"', options={"invocation_timeout_seconds": 3})
        await until(lambda: len(it.engine.running) == 2)
        it.engine.release("b")
        got = await lines_of(it, tmp_path)
        assert [line["status_code"] for line in got] == [504, 200]
        assert it.engine.cancelled == ["a"]


@pytest.mark.parametrize(("data", "message"), [(b"", "is empty"), (b"\n \r\n", "has no lines")])
async def test_an_input_without_lines_is_400(tmp_path: Path, data: bytes, message: str) -> None:
    async with line_bench(tmp_path) as it:
        await send_lines(it, tmp_path, data)
        (response,) = await it.responses_until(1)
        assert response["status_code"] == 400
        assert message in response["body"]["error"]["message"]
        assert response["body"]["error"]["param"] == "input_location"
        assert unfinished(tmp_path) == []


async def test_other_requests_get_their_turn(tmp_path: Path) -> None:
    async with line_bench(tmp_path, capacity=2, is_open=False) as it:
        await send_lines(it, tmp_path, b"".join(b"%d\n" % n for n in range(20)))
        await until(lambda: len(it.engine.running) == 2)
        await it.send("between")
        for n in range(20):
            await until(lambda n=n: str(n) in it.engine.running)
            it.engine.release(n)
            if '"between"' in it.engine.running:
                break
        assert len(it.engine.started) < 10, "one line at a time waits for a slot"
        it.engine.open = True
        for key in list(it.engine.running):
            it.engine.release(json.loads(key))
        await it.responses_until(2)


async def test_a_lost_lease_stops_the_lines_and_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = GateEngine(capacity=2)
    blobs = f"file://{tmp_path}"
    async with (
        bench(engine, request_options="?lease=0.6", start=False, blobs=blobs) as it,
        flaky(it, monkeypatch) as (subscription, _),
    ):
        it.start()
        await send_lines(it, tmp_path, b"1\n2\n3\n")
        await until(lambda: len(engine.running) == 2)
        subscription.hang |= {"set_lease", "receive"}  # a receive under way may bring the worker the next delivery
        (message,) = await it.subscription.receive(1, 10)
        assert await it.subscription.set_lease([message], 60) == [None]
        subscription.hang.discard("set_lease")
        await until(lambda: engine.cancelled and not engine.running)
        assert await it.subscription.ack([message]) == [None]
        subscription.hang.clear()
        await it.stop()
        assert sorted(engine.started) == sorted(engine.cancelled)
        assert (unfinished(tmp_path), it.got) == ([], [])


async def test_a_stop_hands_the_job_back_and_leaves_nothing(tmp_path: Path) -> None:
    async with line_bench(tmp_path, capacity=2, is_open=False, grace_seconds=0.0) as it:
        await send_lines(it, tmp_path, b"1\n2\n3\n")
        await until(lambda: len(it.engine.running) == 2)
        await it.stop()
        assert sorted(it.engine.cancelled) == [1, 2]
        await until_backlog(it, lambda backlog: (backlog.waiting, backlog.held) == (1, 0))
        assert unfinished(tmp_path) == []


async def test_a_stop_lets_the_job_end_within_its_grace(tmp_path: Path) -> None:
    async with line_bench(tmp_path, capacity=2, is_open=False, grace_seconds=20.0) as it:
        await send_lines(it, tmp_path, b"".join(b"%d\n" % n for n in range(100)))
        await until(lambda: len(it.engine.running) == 2)
        stopping = asyncio.create_task(it.stop())
        await until(it.signals.stop.is_set)
        it.engine.open = True
        for number in (0, 1):
            it.engine.release(number)
        await stopping
        assert await lines_of(it, tmp_path) == [ran(number) for number in range(100)]
        await until_empty(it)


async def test_an_engine_that_is_gone_ends_job_and_worker(tmp_path: Path) -> None:
    async with line_bench(tmp_path, capacity=2, is_open=False) as it:
        await send_lines(it, tmp_path, b'1\n"dies"\n3\n')
        it.engine.errors = {"dies": [EngineGone("no more")]}
        await until(lambda: len(it.engine.running) == 2)
        it.engine.release("dies")
        with pytest.raises(EngineGone):
            await asyncio.wait_for(asyncio.shield(it.task), 20)
        await until_backlog(it, lambda backlog: (backlog.waiting, backlog.held) == (1, 0))
        assert (it.engine.cancelled, unfinished(tmp_path)) == ([1], [])


async def test_no_output_is_stored_beside_a_failure(tmp_path: Path) -> None:
    """Another delivery has failed while this one ran, as where a broker delivers twice at once."""
    location = f"file://{tmp_path}/failures/r.json"
    wire = write_response(400, '{"n":1}', {"error": {"message": "of the other"}}, Beside(failure_location=location))
    async with line_bench(tmp_path, is_open=False) as it:
        await send_lines(it, tmp_path, b"1\n", options={"inference_id": "r"})
        await until(lambda: it.engine.running)
        (tmp_path / "failures").mkdir()
        (tmp_path / "failures/r.json").write_bytes(wire)
        it.engine.release(1)
        (response,) = await it.responses_until(1)
        assert (response, unfinished(tmp_path)) == (json.loads(wire), [])


async def test_a_result_that_nobody_foresaw_ends_the_job_and_not_the_worker(tmp_path: Path) -> None:
    class Odd(dict[str, Any]):
        def items(self) -> Any:
            raise LookupError

    class OddEngine(GateEngine):
        async def generate(self, request: Any) -> Any:
            return Odd(await super().generate(request))

    engine = OddEngine()
    engine.open = True
    async with bench(engine, blobs=f"file://{tmp_path}", max_attempts=1) as it:
        await send_lines(it, tmp_path, b"0\n1\n2\n")
        (response,) = await it.responses_until(1)
        assert (response["status_code"], unfinished(tmp_path)) == (500, [])


async def test_a_job_held_for_too_long_is_504(tmp_path: Path) -> None:
    async with line_bench(tmp_path, capacity=2, is_open=False, max_hold_seconds=0.5) as it:
        await send_lines(it, tmp_path, b"1\n2\n3\n")
        (response,) = await it.responses_until(1)
        assert (response["status_code"], response.get("output_location")) == (504, None)
        await until_empty(it)


async def test_a_job_that_expired_is_not_begun(tmp_path: Path) -> None:
    async with line_bench(tmp_path) as it:
        await send_lines(it, tmp_path, b"1\n", options={"deadline": "2020-01-01T00:00:00Z"})
        (response,) = await it.responses_until(1)
        assert (response["status_code"], it.engine.started) == (408, [])


class Broken:
    """Reading a file that its store breaks off after so many bytes, as often as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, times: int) -> None:
        self.times = times
        self.reads = 0
        read = FileStore.read

        @contextlib.asynccontextmanager
        async def broken(store: FileStore, key: str) -> AsyncIterator[Blob]:
            async with read(store, key) as blob:
                self.reads += 1
                yield Blob(blob.size, None, self.chunks(blob, after) if key == "in.jsonl" else blob.chunks)

        monkeypatch.setattr(FileStore, "read", broken)

    async def chunks(self, blob: Blob, after: int) -> AsyncIterator[bytes]:
        data = b"".join([chunk async for chunk in blob.chunks])
        for start in range(0, len(data), 7):
            if self.times and start >= after:
                self.times -= 1
                raise Transient("it broke off")
            yield data[start : start + 7]


async def test_a_store_that_breaks_off_is_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken(monkeypatch, after=100, times=2)
    async with line_bench(tmp_path, max_attempts=3, retry_delay_seconds=0.01) as it:
        await send_lines(it, tmp_path, b"".join(b'"line %d"\n' % n for n in range(100)))
        assert await lines_of(it, tmp_path) == [ran(f"line {n}") for n in range(100)]
        assert len(it.engine.started) == 100, "no line was run twice"
        assert broken.times == 0
        assert it.got[0][1].attributes["attempt"] == "1"


async def test_a_store_that_stays_away_brings_the_job_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Broken(monkeypatch, after=100, times=1000)
    async with line_bench(tmp_path, max_attempts=2, retry_delay_seconds=0.01) as it:
        await send_lines(it, tmp_path, b"".join(b'"line %d"\n' % n for n in range(100)))
        (response,) = await it.responses_until(1)
        assert response["status_code"] == 503
        assert it.got[0][1].attributes["attempt"] == "2"
        assert unfinished(tmp_path) == []


async def test_jobs_beyond_those_that_run_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rejoinder.worker.line_jobs.JOBS", 1)
    async with line_bench(tmp_path, capacity=4, is_open=False, prefetch=10) as it:
        for name in ("a", "b"):
            (tmp_path / f"{name}.jsonl").write_text(f'"{name}"\n')
            location = f"file://{tmp_path}/{name}.jsonl"
            await it.send_raw(json.dumps({"path": "/run", "metadata": {}, "input_location": location}).encode())
        await until(lambda: it.engine.running)
        await it.send("c")
        await until_backlog(it, lambda backlog: (backlog.waiting, backlog.held) == (1, 2))
        (first,) = it.engine.started  # nothing is received while a job waits
        it.engine.open = True
        it.engine.release(first)
        await it.responses_until(3)


async def test_the_window_bounds_what_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rejoinder.worker.line_run.WINDOW_BYTES", 1000)
    async with line_bench(tmp_path, capacity=8, is_open=False) as it:
        await send_lines(it, tmp_path, b"".join(json.dumps(str(n) * 398).encode() + b"\n" for n in range(8)))
        await until(lambda: len(it.engine.running) == 2)
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert len(it.engine.running) == 2, "a third line has no room"
        it.engine.open = True
        for key in list(it.engine.running):
            it.engine.release(json.loads(key))
        assert len(await lines_of(it, tmp_path)) == 8
