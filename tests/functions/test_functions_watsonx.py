"""Services written for watsonx.ai: what they are given and what they may return."""

import asyncio
import base64
import json

import pytest
from function_apps import DEFAULT, ask, serving

from rejoinder.worker.engines.protocol import WithHeaders
from rejoinder.worker.errors import BadRequest, NotGiven

SERVICE = """
    calls = []

    def service(context, model="m", **custom):
        calls.append((context.get_space_id(), model, custom))

        def generate(context):
            body = context.get_json()
            return {"headers": {"X-Calls": len(calls)}, "body": {"echo": body, "of": model}}

        def generate_stream(context):
            for word in context.get_json()["text"].split():
                yield word

        def generate_batch(input_data_references: list[dict], output_data_reference: dict) -> None:
            calls.append((input_data_references, output_data_reference))

        return generate, generate_stream, generate_batch
"""
JOBS = "/ml/v4/deployments_jobs"


async def test_a_service_is_called_once_and_its_closures_serve(tmp_path):
    async with serving(tmp_path, SERVICE, "service", params={"space_id": "s", "model": "x", "k": 1}) as engine:
        assert engine.paths == {DEFAULT, JOBS}
        for _ in range(2):
            answer = await ask(engine, {"text": "a b"})
            assert answer == WithHeaders({"echo": {"text": "a b"}, "of": "x"}, {"X-Calls": "1"})
        chunks = []
        assert await ask(engine, {"text": "a b"}, emit=chunks.append) is None
        assert chunks == ["a", "b"]


async def test_a_job_gets_the_references_of_its_body(tmp_path):
    async with serving(tmp_path, SERVICE, "service") as engine:
        references = {"input_data_references": [{"type": "connection_asset"}], "output_data_reference": {"type": "x"}}
        assert await ask(engine, references, JOBS) is None
        assert await ask(engine, {"deployment": {}, "scoring": references}, JOBS) is None
        for body, param in [
            ("x", None),
            ({}, "input_data_references"),
            ({"scoring": {}}, "scoring.input_data_references"),
            ({"input_data_references": []}, "output_data_reference"),
            ({**references, "output_data_reference": []}, "output_data_reference"),
            ({"scoring": {**references, "input_data_references": {}}}, "scoring.input_data_references"),
        ]:
            with pytest.raises(BadRequest) as caught:
                await ask(engine, body, JOBS)
            assert caught.value.param == param
        assert (await ask(engine)).headers == {"X-Calls": "3"}


async def test_a_service_of_jobs_alone_serves_the_default_path_too(tmp_path):
    source = """
        async def service(context):
            def generate_batch(input_data_references, output_data_reference=None):
                return {"body": input_data_references}
            return generate_batch
    """
    async with serving(tmp_path, source, "service") as engine:
        assert engine.paths == {DEFAULT, JOBS}
        assert await ask(engine, {"input_data_references": [1]}) == [1]


async def test_a_batch_of_one_parameter_gets_contexts_and_marks_give_paths_and_limits(tmp_path):
    source = """
        def service(context):
            sizes = []
            @generate_batch("/batch", max_batch_size=2, key=lambda context: context.get_json()["k"])
            def together(contexts):
                sizes.append(len(contexts))
                return [{"body": [context.get_json()["k"], context.response_id]} for context in contexts]
            async def generate(context): return {"body": sizes}
            return [together, generate]
    """
    async with serving(tmp_path, source, "service", max_wait_ms=20) as engine:
        assert engine.paths == {DEFAULT, "/batch"}
        got = await asyncio.gather(*(ask(engine, {"k": n % 2}, "/batch", response_id=str(n)) for n in range(6)))
        assert got == [[n % 2, str(n)] for n in range(6)]
        assert sorted(await ask(engine)) == [1, 1, 2, 2]


BODIES = [
    ('{"body": {"a": 1}}', {"a": 1}),
    ('{"headers": {"X": 1}}', WithHeaders(None, {"X": "1"})),
    ('{"headers": {}, "body": 5}', 5),
    ('{"headers": {}, "body": 5, "other": 6}', {"headers": {}, "body": 5, "other": 6}),
    ("{}", {}),
    ('"text"', "text"),
    ('{"body": "日".encode()}', "日"),
    ('b"x"', "x"),
    ('{"headers": {"content-type": "text/csv"}, "body": b"a,b"}', WithHeaders("a,b", {"content-type": "text/csv"})),
    (
        '{"headers": {"Content-Type": "application/json; charset=utf-8"}, "body": b\'{"a": [1]}\'}',
        WithHeaders({"a": [1]}, {"Content-Type": "application/json; charset=utf-8"}),
    ),
    ('{"body": b"\\xff\\x00"}', WithHeaders("/wA=", {"Content-Transfer-Encoding": "base64"})),
    (
        '{"headers": {"Content-Type": "image/png"}, "body": b"PNG"}',
        WithHeaders(
            base64.b64encode(b"PNG").decode(), {"Content-Type": "image/png", "Content-Transfer-Encoding": "base64"}
        ),
    ),
]


@pytest.mark.parametrize(("answer", "want"), BODIES)
async def test_what_an_answer_may_be(tmp_path, answer, want):
    source = f"""
        def service(context):
            def generate(context): return {answer}
            return generate
    """
    async with serving(tmp_path, source, "service") as engine:
        assert await ask(engine) == want


async def test_bytes_that_are_not_the_json_that_they_are_said_to_be(tmp_path):
    source = """
        def service(context):
            def generate(context): return {"headers": {"Content-Type": "application/json"}, "body": b"{"}
            return generate
    """
    async with serving(tmp_path, source, "service") as engine:
        with pytest.raises(NotGiven, match="said to be application/json"):
            await ask(engine)


async def test_the_methods_of_the_context(tmp_path):
    source = """
        def service(context):
            @generate("/ml/v4/deployments/d/ai_service/some/where?a=1&b=2&a=3")
            def one(context):
                before = context.get_json()
                told = {
                    "json": before, "payload": context.request_payload_json, "bytes": context.get_bytes().decode(),
                    "headers": context.get_headers(), "method": context.get_method(),
                    "suffix": context.get_path_suffix(), "query": context.get_query_parameters(),
                    "space": context.get_space_id(),
                }
                context.request_payload_json = {"other": 1}
                return {**told, "after": context.get_json()}
            return one
    """
    path = "/ml/v4/deployments/d/ai_service/some/where?a=1&b=2&a=3"
    async with serving(tmp_path, source, "service") as engine:
        told = await ask(engine, {"a": "é"}, path, headers={"Accept": "text/plain"}, response_id="r5")
    assert told == {
        "json": {"a": "é"},
        "payload": {"a": "é"},
        "bytes": json.dumps({"a": "é"}),
        "headers": {"Content-Type": "application/json", "X-Request-Id": "r5", "Accept": "text/plain"},
        "method": "POST",
        "suffix": "some/where?a=1&b=2&a=3",
        "query": {"a": "1", "b": "2"},
        "space": None,
        "after": {"other": 1},
    }


async def test_a_text_has_its_own_bytes(tmp_path):
    source = """
        def service(context):
            def generate(context): return [context.get_bytes().decode(), context.get_headers()["Content-Type"]]
            return generate
    """
    async with serving(tmp_path, source, "service") as engine:
        headers = {"Content-Type": "text/plain"}
        assert await ask(engine, "hi", headers=headers) == ["hi", "text/plain"]
        assert await ask(engine, "hi") == ['"hi"', "application/json"]
