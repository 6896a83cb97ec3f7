"""Apps in real workers: from a request in the queue to the response, with the app in a process of its own."""

import asyncio
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from function_apps import write
from pairs import Queues, sqlite
from worker_process import WorkerProcess

from rejoinder.cli.errors import ExitCode


def envelopes(bodies: Sequence[Any], **fields: Any) -> list[bytes]:
    return [json.dumps({"metadata": {"n": n}, "body": body, **fields}).encode() for n, body in enumerate(bodies)]


async def answers(queues: Queues, count: int) -> list[tuple[int, Any]]:
    """Status and body of each request's response, by the number in its metadata."""
    got = {}
    for message in await queues.receive(count):
        response = json.loads(message.body)
        got[response["metadata"]["n"]] = (response["status_code"], response["body"])
    return [got[n] for n in range(count)]


@contextlib.contextmanager
def working(tmp_path: Path, source: str, *arguments: str, name: str = "", env: Any = None):
    """A worker with an app."""
    app = write(tmp_path, source)
    queues = sqlite(tmp_path)
    engine = ("--app", f"{app}:{name}" if name else app, "--app-dir", str(tmp_path))
    with WorkerProcess(queues, tmp_path / "log", *arguments, engine=engine, env=env) as worker:
        yield worker, queues


def message(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["message"]


async def test_marked_functions(tmp_path):
    source = """
        import logging
        from pydantic import BaseModel
        class Text(BaseModel):
            text: str
        @init
        def load(custom):
            logging.getLogger(__name__).info("words of the app")
            logging.getLogger("library").info("chatter")
            return custom["greeting"]
        @generate
        async def greet(body, state, context):
            return {"text": f"{state} {body}", "id": context.response_id}
        @generate_batch("/upper")
        def upper(bodies: list[Text]): return [body.text.upper() for body in bodies]
    """
    params = tmp_path / "params.json"
    params.write_text('{"greeting": "Hello"}')
    with working(tmp_path, source, "--app-params", f"@{params}") as (worker, queues):
        await queues.send(*envelopes(["you"], options={"inference_id": "mine"}))
        assert await answers(queues, 1) == [(200, {"text": "Hello you", "id": "mine"})]
        await queues.send(*envelopes([{"text": "a"}, {"text": 1}, {"text": "c"}], path="/upper"))
        first, second, third = await answers(queues, 3)
        assert (first, third) == ((200, "A"), (200, "C"))
        assert second[0] == 400
        assert second[1]["error"]["param"] == "text"
        await queues.send(*envelopes([1], path="/nowhere"))
        assert (await answers(queues, 1))[0][0] == 404
        assert worker.stop() == 0
        assert worker.events("engine_ready")[0]["paths"] == ["/upper", "/v1/completions"]
        assert worker.events("words of the app")
        assert not worker.events("chatter")


async def test_a_service(tmp_path):
    source = """
        def service(context, model):
            def generate(context):
                return {"body": [model, context.get_json(), context.get_method()], "headers": {"X-Model": model}}
            return generate
    """
    with working(tmp_path, source, "--app-params", '{"model": "m"}', name="service") as (worker, queues):
        await queues.send(*envelopes([{"a": 1}]))
        assert await answers(queues, 1) == [(200, ["m", {"a": 1}, "POST"])]
        assert worker.stop() == 0


async def test_readiness_waits_for_init(tmp_path):
    source = f"""
        import pathlib, time
        folder = pathlib.Path({str(tmp_path)!r})
        @init
        def load(custom):
            (folder / "loading").write_text(str(custom))
            while not (folder / "go").exists(): time.sleep(0.01)
        @generate
        def one(body): return body
    """
    with working(tmp_path, source, "--app-params", '{"k": [1]}') as (worker, queues):
        await queues.send(*envelopes(["x"]))
        async with asyncio.timeout(60):
            while not (tmp_path / "loading").exists() or not (tmp_path / "loading").read_text():
                await asyncio.sleep(0.02)
        assert (tmp_path / "loading").read_text() == "{'k': [1]}"
        assert not worker.events("engine_ready")
        (tmp_path / "go").touch()
        assert await answers(queues, 1) == [(200, "x")]
        assert worker.events("engine_ready")


@pytest.mark.parametrize("how", ["ctypes.string_at(0)", "os._exit(7)"])
async def test_one_input_that_ends_the_process_and_its_neighbours_are_answered(tmp_path, how):
    source = f"""
        import ctypes, os, time
        @generate
        def one(body):
            time.sleep(0.02)
            if body == 13: {how}
            return body
    """
    with working(tmp_path, source, "--max-attempts", "4", "--retry-delay-seconds", "0.05") as (worker, queues):
        await queues.send(*envelopes(range(40)))
        got = await answers(queues, 40)
        assert [answer for n, answer in enumerate(got) if n != 13] == [(200, n) for n in range(40) if n != 13]
        status, said = message(got[13])
        assert status == 503
        assert "the engine process died" in said
        assert worker.events("engine_process_died")
    # A segfault has no traceback of its own: the log says where it was all the same.
    assert ("Segmentation fault" in (tmp_path / "log").read_text()) == ("string_at" in how)


async def test_a_batch_of_64_with_three_poisonous_items(tmp_path):
    source = """
        @generate_batch(max_batch_size=64, max_wait_ms=2000)
        def many(bodies, contexts):
            for body in bodies:
                if body == 5: raise ValueError("secret of 5")
                if body == 31: raise BadRequest("31 is no text", param="text")
            return [RuntimeError("secret of 60") if body == 60 else [len(bodies), body] for body in bodies]
    """
    with working(tmp_path, source, "--max-attempts", "1") as (worker, queues):
        await queues.send(*envelopes(range(64)))
        got = await answers(queues, 64)
        assert [answer[0] for answer in got].count(200) == 61
        assert all(got[n][1][1] == n for n in range(64) if n not in {5, 31, 60})
        assert message(got[5]) == (500, "the function failed: ValueError")
        assert message(got[31]) == (400, "31 is no text")
        assert message(got[60]) == (500, "the function failed: RuntimeError")
        assert worker.stop() == 0
    log = (tmp_path / "log").read_text()
    assert "ValueError: secret of 5" in log
    assert "Traceback (most recent call last)" in log


async def test_a_retryable_error_comes_back_after_its_delay(tmp_path):
    source = """
        came = []
        @generate
        def one(body):
            came.append(body)
            if len(came) == 1: raise RetryableError("not yet", delay=0.5)
            return len(came)
        @generate("/never")
        def never(body): raise RetryableError("no luck", delay=0)
    """
    more = ("--max-attempts", "2", "--retry-delay-seconds", "300", "--retry-delay-max-seconds", "300")
    with working(tmp_path, source, *more) as (_, queues):
        await queues.send(*envelopes([1]))
        assert await answers(queues, 1) == [(200, 2)]  # and not after the 300 s of the settings
        await queues.send(*envelopes([1], path="/never"))
        assert message((await answers(queues, 1))[0]) == (503, "no luck")


async def test_a_token_file_is_refreshed_meanwhile(tmp_path):
    source = """
        import os
        @generate
        def one(body, context): return [context.get_token(), os.environ["USER_TOKEN_FILE_PATH"]]
    """
    token = tmp_path / "token"
    token.write_text("first")
    with working(tmp_path, source, "--token-file", str(token)) as (_, queues):
        for content in ("first", "other", "third"):
            (tmp_path / "new").write_text(content)
            (tmp_path / "new").replace(token)
            await queues.send(*envelopes([1]))
            assert await answers(queues, 1) == [(200, [content, str(token)])]


async def test_a_token_from_the_environment_is_nowhere_to_be_read(tmp_path):
    source = """
        import os, pathlib
        @generate
        def one(body, context):
            commands = [pathlib.Path(f"/proc/{pid}/cmdline").read_text() for pid in (os.getpid(), os.getppid())]
            return [context.get_token(), pathlib.Path(os.environ["USER_TOKEN_FILE_PATH"]).read_text(),
                    any("top-secret" in command for command in commands)]
    """
    with working(tmp_path, source, env={"REJOINDER_TOKEN": "top-secret"}) as (worker, queues):
        await queues.send(*envelopes([1]))
        assert await answers(queues, 1) == [(200, ["top-secret", "top-secret", False])]
        assert worker.stop() == 0
    assert "top-secret" not in (tmp_path / "log").read_text()


async def test_json_lines_run_through_the_same_batches(tmp_path):
    source = """
        @generate_batch(max_batch_size=16, max_wait_ms=200)
        def many(bodies): return [[body["n"], len(bodies)] for body in bodies]
    """
    lines = 100
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"n": n}) + "\n" for n in range(lines)))
    store = f"file://{tmp_path}/blobs"
    (tmp_path / "blobs").mkdir()
    with working(tmp_path, source, "--blobs", store, "--allow-input", f"file://{tmp_path}/") as (worker, queues):
        location = f"file://{tmp_path}/in.jsonl"
        await queues.send(json.dumps({"metadata": {"n": 0}, "input_location": location}).encode())
        [message] = await queues.receive(1)
        response = json.loads(message.body)
        assert response["status_code"] == 200, response
        output = Path(response["output_location"].removeprefix("file://")).read_text().splitlines()
        results = [json.loads(line) for line in output]
        bodies = [result.get("body", result) if isinstance(result, dict) else result for result in results]
        assert [n for n, _ in bodies] == list(range(lines))
        assert max(size for _, size in bodies) > 4  # they shared calls
        assert worker.stop() == 0


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        ("import nothing_of_this_name", "", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("x = 1", "", "is marked with one of @generate"),
        ("@generate\ndef one(body, model): return 1", "", "generate 'one' has a parameter 'model'"),
        (
            "@init\ndef load():\n    raise OSError('no weights')\n@generate\ndef one(body): return 1",
            "",
            "OSError: no weights",
        ),
        ("def service(context, model): return 1", "service", "missing a required argument: 'model'"),
        ("import os; os._exit(3)", "", "exit status 3"),
    ],
)
async def test_an_app_that_cannot_be_served_ends_the_worker_with_one_line(tmp_path, source, name, said):
    with working(tmp_path, "\n" + source, name=name) as (worker, _):
        code = await asyncio.to_thread(worker.process.wait, 120)
    assert code == ExitCode.FAILED
    log = (tmp_path / "log").read_text()
    lines = [line for line in log.splitlines() if line.startswith("rejoinder worker: ")]
    assert len(lines) == 1
    assert said in lines[0]
    if "OSError" in said or "ModuleNotFound" in said:
        assert "Traceback (most recent call last)" in log  # in the structured event, for who mends it


async def test_the_workers_own_process_does_not_import_the_app(tmp_path):
    source = f"""
        import os, pathlib
        with pathlib.Path({str(tmp_path)!r}, "imported").open("a") as file: file.write(f"{{os.getpid()}}\\n")
        @generate
        def one(body): return os.getpid()
    """
    for arguments, own in [((), False), (("--no-engine-process",), True)]:
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "imported").unlink()
        with working(tmp_path, source, *arguments) as (worker, queues):
            await queues.send(*envelopes([1]))
            [(status, pid)] = await answers(queues, 1)
            assert status == 200
            assert (pid == worker.process.pid) is own
            assert (tmp_path / "imported").read_text().split() == [str(pid)]
            assert worker.stop() == 0


async def test_several_processes_each_with_its_own_init(tmp_path):
    source = """
        import os, time
        @init
        def load(): return os.getpid()
        @generate(concurrency=1)
        def one(body, state):
            time.sleep(0.05)
            return [state, os.getpid(), os.environ.get("OMP_NUM_THREADS")]
    """
    with working(tmp_path, source, "--engine-processes", "2") as (_, queues):
        await queues.send(*envelopes(range(20)))
        got = [body for _, body in await answers(queues, 20)]
        assert len({state for state, _, _ in got}) == 2
        assert all(state == pid and int(threads) >= 1 for state, pid, threads in got)


async def test_streams_and_headers_cross_the_whole_way(tmp_path):
    source = """
        @generate_stream
        def stream(body, context):
            yield context.get_headers()
            for number in range(body): yield {"n": number}
        @generate
        def one(body): return WithHeaders(body, {"X-Of": "one"})
    """
    with working(tmp_path, source) as (worker, queues):
        options = {"stream": True, "content_type": "application/x-of-mine", "inference_id": "i"}
        await queues.send(*envelopes([50], options=options))
        parts: list[dict[str, Any]] = []
        async with asyncio.timeout(120):
            while not parts or not parts[-1]["stream"]["done"]:
                parts += [json.loads(message.body) for message in await queues.receive_some(0.5)]
        assert [part["stream"]["index"] for part in parts] == list(range(len(parts)))
        chunks: list[Any] = []
        for part in parts:
            count = part["stream"].get("chunks", 1)
            chunks += [part["body"]] if count == 1 else part["body"] if count else []
        headers, *rest = chunks
        assert headers == {"Content-Type": "application/x-of-mine", "X-Request-Id": "i"}
        assert rest == [{"n": number} for number in range(50)]
        await queues.send(*envelopes([5]))
        [message] = await queues.receive(1)
        assert json.loads(message.body) == {
            "status_code": 200,
            "metadata": {"n": 0},
            "body": 5,
            "headers": {"X-Of": "one"},
        }
        assert worker.stop() == 0
