"""Results and failures in stores: where they go, that they go once, and that what is there is the answer."""

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from objects import content, content_at
from store_harness import answered, files
from worker_harness import Bench, GateEngine, bench, flaky

from rejoinder.adapters import LeaseLost
from rejoinder.adapters.memory import fresh_url
from rejoinder.schemas.envelope import Options, response_head, write_response
from rejoinder.worker.errors import BadRequest, Failed
from rejoinder.worker.object_names import object_name, output_key

LARGE = "x" * 5000


class ResultEngine(GateEngine):
    """Answers each request with a result that the test gives."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.open = True
        self.result = result

    async def generate(self, request: Any) -> Any:
        await super().generate(request)
        return self.result


@pytest.fixture(params=["memory", "file"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return fresh_url() if request.param == "memory" else f"file://{tmp_path}/blobs"


def opened(**settings: Any) -> Any:
    engine = GateEngine()
    engine.open = True
    return bench(engine, max_inline_bytes=1000, **settings)


# ---------------------------------------------------------------------- where


async def test_a_large_result_is_stored_and_a_small_one_is_not(blobs: str) -> None:
    async with opened(blobs=blobs) as it:
        await it.send(LARGE, {"n": 1})
        (large,) = await answered(it)
        name = it.got[0][1].attributes["response_id"]
        location = f"{blobs}/outputs/{name}.out"
        assert large == {"status_code": 200, "metadata": {"n": 1}, "body": None, "output_location": location}
        assert (
            await content(f"{blobs}/outputs", f"{name}.out")
            == json.dumps({"ran": LARGE}, separators=(",", ":")).encode()
        )
        await it.send("small", {"n": 2})
        _, small = await answered(it, 2)
        assert small == {"status_code": 200, "metadata": {"n": 2}, "body": {"ran": "small"}}


async def test_the_threshold_is_of_the_whole_response(blobs: str) -> None:
    async with opened(blobs=blobs) as it:
        await it.send("x" * 600, {"text": "y" * 600})
        (response,) = await answered(it)
        assert response["body"] is None
        assert json.loads(await content_at(response["output_location"])) == {"ran": "x" * 600}


async def test_without_a_threshold_it_is_what_the_topic_carries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("rejoinder.adapters.memory.MemoryTopic.max_body", 2000)
    engine = GateEngine()
    engine.open = True
    async with bench(engine, blobs=f"file://{tmp_path}", max_inline_bytes=1_000_000) as it:
        await it.send(LARGE)
        (response,) = await answered(it)
        assert response["output_location"]
        await it.send("z" * 1000)
        assert (await answered(it, 2))[1]["body"] == {"ran": "z" * 1000}


async def test_paths_of_their_own(tmp_path: Path) -> None:
    paths = {"output_path": f"file://{tmp_path}/out", "failure_path": f"file://{tmp_path}/bad/sub"}
    async with opened(**paths) as it:
        await it.send(LARGE, options={"inference_id": "good"})
        await it.send("x", path="/nowhere", options={"inference_id": "bad"})
        await answered(it, 2)
        assert files(tmp_path) == ["bad/sub/bad.json", "out/good.out"]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"inference_id": "a"}, "a.out"),
        ({"inference_id": "a", "filename": "f.json"}, "a.d/f.json"),
        ({"inference_id": "a", "output_path_extension": "x/y z"}, "x/y z/a.out"),
        ({"inference_id": "a", "output_path_extension": "x+ü", "filename": "f"}, "x+ü/a.d/f"),
        ({"inference_id": "../b"}, object_name("../b") + ".out"),
    ],
)
async def test_what_the_sender_asks_for(tmp_path: Path, options: dict[str, Any], key: str) -> None:
    async with opened(blobs=f"file://{tmp_path}") as it:
        body = LARGE if len(options) == 1 else "small"  # who names a place gets it there, whatever its size
        await it.send(body, options=options)
        (response,) = await answered(it)
        assert response["output_location"] == f"file://{tmp_path}/outputs/{key}"
        assert files(tmp_path) == [f"outputs/{key}"]
        assert json.loads((tmp_path / "outputs" / key).read_bytes()) == {"ran": body}


@pytest.mark.parametrize("extension", ["a.d", "a.out", "x/a.OUT/y", "a.d/y", "/".join(["\U0001f600" * 60] * 5)])
async def test_an_extension_that_could_be_in_another_answers_way_or_is_too_long_is_refused(
    tmp_path: Path, extension: str
) -> None:
    async with opened(blobs=f"file://{tmp_path}") as it:
        await it.send("x", options={"output_path_extension": extension})
        (response,) = await answered(it)
        assert (response["status_code"], response["body"]["error"]["param"]) == (400, "options.output_path_extension")
        assert it.engine.started == []


PART = st.text("abd.-", min_size=1, max_size=4).filter(lambda part: part not in {".", ".."})
OPTIONS = st.builds(
    Options,
    filename=st.none()
    | st.text("abdout.", min_size=1, max_size=6).filter(lambda name: name.count(".") < 2 and name != "."),
    output_path_extension=st.none() | st.lists(PART, min_size=1, max_size=3).map("/".join),
)


@given(PART, OPTIONS, PART, OPTIONS)
def test_no_two_answers_have_one_key(first: str, options: Options, second: str, others: Options) -> None:
    try:
        same = output_key(first, options) == output_key(second, others)
    except BadRequest:
        return
    if same:
        assert (first, options) == (second, others)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=64))
def test_names_are_safe_and_different(inference_id: str) -> None:
    name = object_name(inference_id)
    assert "/" not in name
    assert not name.startswith(".")
    assert name == inference_id or len(name) == 64


def test_a_response_begins_with_its_head() -> None:
    for metadata in (None, '{"a":"\uffff\u00fc"}'):
        assert write_response(404, metadata, {"b": 1}).startswith(response_head(404, metadata).encode())


# ---------------------------------------------------------------------- failures


async def test_failures_are_stored_as_they_are_answered(tmp_path: Path) -> None:
    async with opened(blobs=f"file://{tmp_path}") as it:
        await it.send("x", {"n": 7}, path="/nowhere", options={"inference_id": "f"})
        (response,) = await answered(it)
        assert response["failure_location"] == f"file://{tmp_path}/failures/f.json"
        assert response["body"]["error"]["param"] == "path"
        assert files(tmp_path) == ["failures/f.json"]
        assert (tmp_path / "failures/f.json").read_bytes() == it.got[0][1].body


async def test_what_is_no_request_is_stored_too(tmp_path: Path) -> None:
    async with opened(blobs=f"file://{tmp_path}") as it:
        await it.send_raw(b"nonsense")
        (response,) = await answered(it)
        name = it.got[0][1].attributes["response_id"]
        assert (response["status_code"], response["metadata"]) == (400, None)
        assert files(tmp_path) == [f"failures/{name}.json"]


async def test_an_error_that_is_retried_is_stored_only_when_it_is_answered(tmp_path: Path) -> None:
    async with opened(blobs=f"file://{tmp_path}", max_attempts=2) as it:
        it.engine.errors = {"once": [Failed("no")], "always": [Failed("no"), Failed("no")]}
        await it.send("once", options={"inference_id": "once"})
        await it.send("always", options={"inference_id": "always"})
        got = {json.dumps(response["body"]): response for response in await answered(it, 2)}
        assert {response["status_code"] for response in got.values()} == {200, 500}
        assert files(tmp_path) == ["failures/always.json"]


@pytest.mark.parametrize("result", [float("nan"), {"a": float("inf")}])
async def test_a_result_that_is_no_json_is_a_failure(tmp_path: Path, result: Any) -> None:
    async with bench(ResultEngine(result), blobs=f"file://{tmp_path}") as it:
        await it.send("x", {"n": 1}, options={"inference_id": "nan", "filename": "r.json"})
        (response,) = await answered(it)
        assert (response["status_code"], response["metadata"]) == (500, {"n": 1})
        assert files(tmp_path) == ["failures/nan.json"]


async def test_metadata_that_leaves_no_room_for_a_location_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("rejoinder.adapters.embedded.MAX_BODY", 4000)
    monkeypatch.setattr("rejoinder.adapters.memory.MemoryTopic.max_body", 4000)
    async with bench(ResultEngine(LARGE), blobs=f"file://{tmp_path}") as it:
        await it.send("x", {"text": "y" * 3600}, options={"inference_id": "m"})
        (response,) = await answered(it)
        assert response["body"]["error"]["code"] == "response_too_large"
        assert files(tmp_path) == ["failures/m.json"]


async def test_without_an_output_path_a_result_that_is_too_large_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("rejoinder.adapters.memory.MemoryTopic.max_body", 2000)
    async with bench(ResultEngine(LARGE), failure_path=f"file://{tmp_path}") as it:
        await it.send("x", {"n": 1}, options={"inference_id": "large"})
        (response,) = await answered(it)
        assert response["body"]["error"]["code"] == "response_too_large"
        assert response["failure_location"] == f"file://{tmp_path}/large.json"


# ---------------------------------------------------------------------- redeliveries


async def lose_the_first_ack(it: Bench, monkeypatch: pytest.MonkeyPatch) -> Any:
    context = flaky(it, monkeypatch)
    subscription, _ = await context.__aenter__()
    subscription.fail["ack"] = [LeaseLost("test")]
    return subscription


@pytest.mark.parametrize("body", [LARGE, "small and named"])
async def test_a_redelivery_is_answered_from_the_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str
) -> None:
    async with opened(blobs=f"file://{tmp_path}", request_options="?lease=2", start=False) as it:
        await lose_the_first_ack(it, monkeypatch)
        it.start()
        await it.send(body, {"n": 2**80}, options={"filename": "f"} if body != LARGE else None)
        first, second = await answered(it, 2)
        assert first == second
        assert first["metadata"] == {"n": 2**80}
        assert it.got[0][1].body == it.got[1][1].body
        assert it.engine.started == [body]
        assert len(files(tmp_path)) == 1


async def test_a_redelivery_of_a_failure_is_that_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with opened(blobs=f"file://{tmp_path}", request_options="?lease=2", start=False) as it:
        await lose_the_first_ack(it, monkeypatch)
        it.engine.errors = {LARGE: [BadRequest("only the first time", param="body")]}
        it.start()
        await it.send(LARGE)
        first, second = await answered(it, 2)
        assert first["body"]["error"]["message"] == "only the first time"
        assert it.got[0][1].body == it.got[1][1].body
        assert (first["status_code"], second["status_code"]) == (400, 400)
        assert it.engine.started == [LARGE]
        assert [name.split("/")[0] for name in files(tmp_path)] == ["failures"]


async def test_one_that_expired_meanwhile_is_answered_with_its_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    later = [0.0]
    monkeypatch.setattr("rejoinder.worker.handler.time.time", lambda real=time.time: real() + later[0])
    async with opened(blobs=f"file://{tmp_path}", request_options="?lease=2", start=False) as it:
        await lose_the_first_ack(it, monkeypatch)
        it.start()
        deadline = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        await it.send(LARGE, options={"deadline": deadline, "output_path_extension": "e"})
        await it.responses_until(1)
        later[0] = 7200.0
        await answered(it, 2)
        assert it.got[0][1].body == it.got[1][1].body
        assert it.got[1][0]["status_code"] == 200
        assert len(files(tmp_path)) == 1


async def test_two_requests_of_one_inference_id_have_one_result_and_their_own_metadata(blobs: str) -> None:
    async with opened(blobs=blobs) as it:
        for n in (1, 2):
            await it.send(LARGE, {"n": n}, options={"inference_id": "same"})
            await answered(it, n)
        first, second = (response for response, _ in it.got)
        assert first["output_location"] == second["output_location"]
        assert (first["metadata"], second["metadata"]) == ({"n": 1}, {"n": 2})
        assert it.engine.started == [LARGE]
