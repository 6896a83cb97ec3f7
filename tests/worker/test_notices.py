"""SageMaker's notifications: to the right topic, after the response and before the ack."""

import base64
import contextlib
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from store_harness import answered
from virtual_time import virtually
from worker_harness import Flaky, GateEngine, bench, until, until_backlog, until_empty

from rejoinder.adapters import Denied, NotFound, Transient, open_subscription, open_topic
from rejoinder.adapters.memory import fresh_url
from rejoinder.worker.errors import Failed


class Notified:
    """A bench whose worker tells of its answers, and what it told."""

    def __init__(self, it: Any, topics: dict[str, Flaky], urls: dict[str, str]) -> None:
        self.it, self.topics, self.urls = it, topics, urls

    async def told(self, which: str, count: int = 1) -> list[dict[str, Any]]:
        async with open_subscription(self.urls[which]) as subscription:
            messages = await subscription.receive(100, 5.0)
            while len(messages) < count:
                messages += await subscription.receive(100, 5.0)
            assert await subscription.receive(100, 0.1) == []
            await subscription.ack(messages)
        return [json.loads(message.body) for message in messages]


@contextlib.asynccontextmanager
async def notified(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> AsyncIterator[Notified]:
    urls = {"success": fresh_url(), "error": fresh_url()}
    topics = {name: Flaky() for name in urls}

    @contextlib.asynccontextmanager
    async def opened(url: str) -> AsyncIterator[Any]:
        async with open_topic(url) as inner:
            part = next((topics[name] for name in urls if urls[name] == url), None)
            if part is not None:
                part.inner = inner
            yield part or inner

    monkeypatch.setattr("rejoinder.worker.service.open_topic", opened)
    engine = GateEngine()
    engine.open = True
    names = {f"{name}_topic": url for name, url in urls.items()}
    async with bench(engine, **names, **settings) as it:
        yield Notified(it, topics, urls)


async def test_a_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with notified(monkeypatch, blobs=f"file://{tmp_path}", endpoint_name="e") as them:
        before = datetime.now(UTC)
        options = {"inference_id": "i", "content_type": "application/json", "accept": "text/x", "filename": "f"}
        await them.it.send("x", options=options)
        (response,) = await answered(them.it)
        (notice,) = await them.told("success")
        times = [datetime.fromisoformat(notice.pop(name)) for name in ("receivedTime", "eventTime")]
        assert before.timestamp() - 0.001 <= times[0].timestamp() <= times[1].timestamp()
        assert notice == {
            "awsRegion": "",
            "invocationStatus": "Completed",
            "requestParameters": {"accept": "text/x", "contentType": "application/json", "endpointName": "e"},
            "responseParameters": {"contentType": "application/json", "outputLocation": response["output_location"]},
            "inferenceId": "i",
            "eventVersion": "1.0",
            "eventSource": "aws:sagemaker",
            "eventName": "InferenceResult",
        }


async def test_the_success_of_a_job_of_lines_says_what_is_stored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text("1\n2\n")
    location = f"file://{tmp_path}/in.jsonl"
    async with notified(monkeypatch, blobs=f"file://{tmp_path}", include_inference_response=True) as them:
        await them.it.send_raw(json.dumps({"path": "/run", "metadata": {}, "input_location": location}).encode())
        (response,) = await answered(them.it)
        (notice,) = await them.told("success")
        assert notice["requestParameters"] == {"endpointName": "rejoinder", "inputLocation": location}
        stored = {"contentType": "application/jsonl", "outputLocation": response["output_location"]}
        assert notice["responseParameters"] == stored
        assert "responseBody" not in notice


@pytest.mark.parametrize(
    ("fields", "status", "reason"),
    [
        (
            {"path": "/nowhere"},
            "Failed",
            "ClientError: Received client error (404) from model. unknown path '/nowhere'",
        ),
        ({"body": "bad"}, "Failed", "ClientError: Received server error (500) from model. it is broken"),
        ({"options": {"inference_id": "i", "deadline": "2020-01-01T00:00:00Z"}}, "Expired", "ClientError: the request"),
    ],
)
async def test_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fields: dict[str, Any], status: str, reason: str
) -> None:
    async with notified(monkeypatch, blobs=f"file://{tmp_path}", max_attempts=1) as them:
        them.it.engine.errors = {"bad": [Failed("it is broken")]}
        await them.it.send(**{"body": "x", "options": {"inference_id": "i"}, **fields})
        (response,) = await answered(them.it)
        (notice,) = await them.told("error")
        assert notice["invocationStatus"] == status
        assert notice["failureReason"].startswith(reason)
        assert notice["responseParameters"]["failureLocation"] == response["failure_location"]
        assert notice["inferenceId"] == "i"


@virtually
async def test_the_response_is_included_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async with notified(monkeypatch, include_inference_response=True) as them:
        for body in ("x", "y" * 200_000):
            await them.it.send(body)
        await answered(them.it, 2)
        small, large = sorted(await them.told("success", 2), key=lambda notice: "responseBody" not in notice)
        assert json.loads(base64.b64decode(small["responseBody"]["content"])) == {"ran": "x"}
        assert "responseBody" not in large


@virtually
async def test_a_topic_that_is_away_is_waited_for_after_the_response_and_before_the_ack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with notified(monkeypatch, request_options="?lease=0.5") as them:
        them.topics["success"].fail["publish"] = [Transient("away")] * 2
        them.topics["success"].hang.add("publish")
        await them.it.send("x")
        await them.it.responses_until(1)
        await until(lambda: them.topics["success"].under_way)
        await until_backlog(them.it, lambda backlog: backlog.held == 1)
        them.topics["success"].hang.clear()
        await until_empty(them.it)
        assert len(await them.told("success")) == 1
        assert len(them.it.got) == 1


@virtually
async def test_a_notice_that_its_broker_does_not_take_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with notified(monkeypatch) as them:
        them.topics["success"].fail["publish"] = [ValueError("no such attribute")]  # type: ignore[list-item]
        await them.it.send("x")
        await answered(them.it)
        assert them.topics["success"].calls == ["publish"]


@pytest.mark.parametrize(("limit", "told"), [(700, 1), (200, 0)])
@virtually
async def test_a_notice_that_is_too_large_goes_without_the_response_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, limit: int, told: int
) -> None:
    async with notified(monkeypatch, include_inference_response=True) as them:
        monkeypatch.setattr("rejoinder.adapters.embedded.MAX_BODY", limit)
        await them.it.send("x" * min(limit - 100, 400))
        await answered(them.it)
        if told:
            (notice,) = await them.told("success")
            assert "responseBody" not in notice
        else:
            assert them.topics["success"].calls == ["publish"] * 2


@pytest.mark.parametrize("error", [Denied("no sns:Publish"), NotFound("no topic")])
@virtually
async def test_a_topic_that_refuses_ends_the_worker(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async with notified(monkeypatch) as them:
        them.topics["error"].fail["publish"] = [error]  # type: ignore[list-item]
        await them.it.send("x", path="/nowhere")
        assert them.it.task is not None
        with pytest.raises(type(error), match=str(error)):
            await them.it.task
        await until_backlog(them.it, lambda backlog: backlog.waiting == 1)


@virtually
async def test_many_go_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    async with notified(monkeypatch) as them:
        for n in range(200):
            await them.it.send(n)
        await answered(them.it, 200)
        assert len(await them.told("success", 200)) == 200
        assert len(them.topics["success"].calls) < 150
