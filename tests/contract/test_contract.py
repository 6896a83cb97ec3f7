"""The wire cases, and what no list of cases foresees, through a real worker process with the echo engine."""

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from broker_pairs import pair_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pairs import Queues, sqlite
from worker_process import WorkerProcess

from rejoinder.adapters import Message


def load(config: pytest.Config) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads(Path(config.getoption("contract_cases")).read_text())["cases"]
    return cases


def request_of(case: dict[str, Any]) -> bytes:
    if "request_base64" in case:
        return base64.b64decode(case["request_base64"])
    return str(case["request"]).encode()


@pytest.fixture(params=["sqlite", "sqs", "sqs>sns", "pubsub"])
async def worker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Queues, WorkerProcess]]:
    on_disk = request.param == "sqlite"
    queues = sqlite(tmp_path, lease=2) if on_disk else await pair_of(request, request.param).queues()
    with WorkerProcess(queues, tmp_path / "worker.log") as process:
        process.until_event("engine_ready")
        yield queues, process


def in_order(value: Any) -> Any:
    """A JSON value that compares with its keys' order, and never takes 1 for true or 1.0."""
    if isinstance(value, dict):
        return [(key, in_order(inner)) for key, inner in value.items()]
    if isinstance(value, list):
        return ["list", *map(in_order, value)]
    return (type(value).__name__, value)


def check(case: dict[str, Any], message: Message) -> None:
    response, expected = json.loads(message.body), case["expect"]
    assert response["status_code"] == expected["status_code"], response
    assert in_order(response["metadata"]) == in_order(expected["metadata"])
    if "error_contains" in expected:
        assert expected["error_contains"].lower() in response["body"]["error"]["message"].lower()
    else:
        assert in_order(response["body"]) == in_order(expected["body"])
    text = message.body.decode()
    assert not any(ord(c) < 0x20 or c in "\ufffe\uffff" for c in text), "a character that SQS refuses"


async def test_every_case_holds(worker: tuple[Queues, WorkerProcess], pytestconfig: pytest.Config) -> None:
    queues, process = worker
    cases = load(pytestconfig)
    ids = await queues.send(*map(request_of, cases))
    by_request = {m.attributes["request_message_id"]: m for m in await queues.receive(len(cases))}
    assert len(by_request) == len(cases)
    for message_id, case in zip(ids, cases, strict=True):
        message = by_request[message_id]
        try:
            check(case, message)
        except AssertionError as exc:
            raise AssertionError(f"case {case['name']!r}: {exc}\nresponse: {message.body!r}") from exc
        inference_id = json_or_none(request_of(case), "options", "inference_id")
        if isinstance(inference_id, str):
            assert message.attributes["response_id"] == inference_id
    assert not process.events("engine_error")
    await check_settled(queues, process)


async def check_settled(queues: Queues, process: WorkerProcess) -> None:
    """Every request is acked: none comes back to anybody."""
    assert process.stop() == 0, process.log.read_text()
    assert not await queues.left_over()


def json_or_none(data: bytes, *path: str) -> Any:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return value


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
ENVELOPE = st.fixed_dictionaries(
    {},
    optional={
        "path": st.sampled_from(["/echo", "echo", "/", "", "//echo", "/v1/completions"]) | JSON,
        "metadata": st.dictionaries(st.text(), JSON, max_size=3) | JSON,
        "body": JSON,
        "input_location": JSON,
        "options": st.dictionaries(
            st.sampled_from(
                ["inference_id", "request_ttl_seconds", "invocation_timeout_seconds", "deadline", "stream", "filename"]
            ),
            JSON | st.datetimes().map(lambda at: at.isoformat() + "Z"),
            max_size=3,
        )
        | JSON,
    },
)


def mangle(parts: tuple[bytes, int, bytes]) -> bytes:
    data, at, extra = parts
    return data[: at % (len(data) + 1)] + extra + data[at % (len(data) + 1) :]


REQUEST = ENVELOPE.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
ANYTHING = st.binary() | REQUEST | st.tuples(REQUEST, st.integers(0, 10_000), st.binary(max_size=4)).map(mangle)


async def test_no_input_makes_the_worker_die_hang_or_answer_with_no_json(
    worker: tuple[Queues, WorkerProcess],
) -> None:
    queues, process = worker
    inputs: list[bytes] = []

    @settings(
        max_examples=600 if queues.outbox.startswith("sqlite") else 200,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(ANYTHING)
    def collect(data: bytes) -> None:
        inputs.append(data)

    collect()
    ids = await queues.send(*inputs)
    messages = await queues.receive(len(inputs))
    answers = {m.attributes["request_message_id"]: json.loads(m.body) for m in messages}
    assert set(answers) == set(ids)
    for message_id, data in zip(ids, inputs, strict=True):
        answer = answers[message_id]
        assert list(answer) == ["status_code", "metadata", "body"]
        assert answer["status_code"] in (200, 400, 403, 404, 408), (data, answer)
        if answer["status_code"] == 200:
            assert answer["metadata"] == json.loads(data)["metadata"]
        else:
            assert answer["body"]["error"]["message"]
    assert process.process.poll() is None
    assert not process.events("engine_error")
    await check_settled(queues, process)
