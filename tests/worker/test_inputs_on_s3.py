"""Inputs on S3: by location, by the bucket's own events, and by an Extended Client's pointer."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiobotocore.session import get_session
from aws_resources import Raw, make_queue, name_of
from worker_harness import GateEngine, bench, until

from rejoinder.adapters import open_subscription
from rejoinder.worker.engines.protocol import EngineRequest
from rejoinder.worker.service import StopSignals, serve
from rejoinder.worker.settings import Settings

KEYS = ["plain.json", "a b/c+d %2F.json", "é ü/日本 &=;?#.json"]


@pytest.fixture
async def s3(aws: str) -> AsyncIterator[Any]:
    async with get_session().create_client("s3") as client:
        yield client


@pytest.fixture
async def bucket(s3: Any) -> str:
    name = f"b-{uuid.uuid4().hex}"
    await s3.create_bucket(Bucket=name)
    return name


def opened() -> GateEngine:
    engine = GateEngine()
    engine.open = True
    return engine


async def test_objects_are_read_and_lines_are_run(s3: Any, bucket: str) -> None:
    objects = {f"in/{key}": json.dumps(key).encode() for key in KEYS}
    objects |= {"in/cut.json": b'{"a', "in/utf-16.json": '"é"'.encode("utf-16"), "in/empty": b"", "out/x.json": b"1"}
    objects["in/lines.ndjson"] = b"".join(b"%d\n" % n for n in range(1000))
    for key, data in objects.items():
        await s3.put_object(Bucket=bucket, Key=key, Body=data)
    root = f"s3://{bucket}"
    wanted = {f"{root}/in/{key}": (200, {"ran": key}) for key in KEYS}
    bad = {"in/cut.json": 400, "in/utf-16.json": 400, "in/empty": 400, "in/missing": 404, "out/x.json": 403}
    wanted |= {f"{root}/{key}": (status_code, None) for key, status_code in bad.items()}
    wanted |= {f"{root}-other/in/x": (403, None), f"{root}/in/lines.ndjson": (200, None)}
    async with bench(opened(), allow_input=f"{root}/in", output_path=f"{root}/results") as it:
        for location in wanted:
            await it.send_raw(
                json.dumps({"path": "/run", "metadata": {"at": location}, "input_location": location}).encode()
            )
        for response in await it.responses_until(len(wanted)):
            location = response["metadata"]["at"]
            ran = response["body"] if response["status_code"] == 200 else None
            assert (response["status_code"], ran) == wanted[location], location
            if location.endswith("ndjson"):
                key = response["output_location"].removeprefix(f"{root}/")
    answer = await s3.get_object(Bucket=bucket, Key=key)
    assert answer["ContentType"] == "application/jsonl"
    lines = [json.loads(line) for line in (await answer["Body"].read()).splitlines()]
    assert lines == [{"status_code": 200, "body": {"ran": n}} for n in range(1000)]


async def test_a_bucket_that_is_not_there_is_404(aws: str) -> None:
    missing = f"s3://b-{uuid.uuid4().hex}"
    async with bench(opened(), allow_input=missing) as it:
        await it.send_raw(json.dumps({"path": "/run", "metadata": {}, "input_location": f"{missing}/x"}).encode())
        (response,) = await it.responses_until(1)
        assert response["status_code"] == 404


class LastHangs(GateEngine):
    """Answers all but one request at once."""

    async def generate(self, request: EngineRequest) -> Any:
        self.open = request.body != "hangs"
        return await super().generate(request)


async def test_a_stop_leaves_no_part_of_an_output(s3: Any, bucket: str) -> None:
    lines = [json.dumps(f"{n}" * 1_000_000) for n in range(9)] * 3
    await s3.put_object(Bucket=bucket, Key="in.jsonl", Body="\n".join([*lines, '"hangs"']).encode())
    engine = LastHangs()
    async with bench(engine, blobs=f"s3://{bucket}", grace_seconds=0.0) as it:
        envelope = {"path": "/run", "metadata": {}, "input_location": f"s3://{bucket}/in.jsonl"}
        await it.send_raw(json.dumps(envelope).encode())
        await until(lambda: '"hangs"' in engine.running)
        uploads: list[Any] = []
        async with asyncio.timeout(30):
            while not uploads:
                uploads = (await s3.list_multipart_uploads(Bucket=bucket)).get("Uploads", [])
        await it.stop()
        assert engine.cancelled == ["hangs"]
    assert (await s3.list_multipart_uploads(Bucket=bucket)).get("Uploads", []) == []
    assert [one["Key"] for one in (await s3.list_objects_v2(Bucket=bucket))["Contents"]] == ["in.jsonl"]


async def test_what_a_bucket_gets_is_run(s3: Any, bucket: str) -> None:
    (requests, _), (responses, _) = await make_queue(), await make_queue()
    rule = {"QueueArn": requests, "Events": ["s3:ObjectCreated:*"]}
    # The bucket sends its test event now.
    configuration = {"QueueConfigurations": [rule]}
    await s3.put_bucket_notification_configuration(Bucket=bucket, NotificationConfiguration=configuration)
    for key in KEYS:
        await s3.put_object(Bucket=bucket, Key=key, Body=json.dumps(key).encode())
    pointer = {"s3BucketName": bucket, "s3Key": "stored/request"}
    request = {"path": "/run", "metadata": {"key": "stored"}, "body": "stored"}
    # Where no event tells of it.
    await s3.put_bucket_notification_configuration(Bucket=bucket, NotificationConfiguration={})
    await s3.put_object(Bucket=bucket, Key=pointer["s3Key"], Body=json.dumps(request).encode())
    async with Raw(requests) as queue:
        text = json.dumps(["software.amazon.payloadoffloading.PayloadS3Pointer", pointer])
        await queue.send(text, {"ExtendedPayloadSize": {"DataType": "Number", "StringValue": "99"}})
    settings = Settings(
        requests=f"awssqs:///{name_of(requests)}",
        responses=f"awssqs:///{name_of(responses)}",
        engine="echo",
        s3_event_path="/run",
        allow_input=[f"s3://{bucket}"],
    )
    signals = StopSignals()
    worker = asyncio.create_task(serve(settings, signals, opened()))
    got: dict[str, Any] = {}
    async with open_subscription(settings.responses) as subscription, asyncio.timeout(60):
        while len(got) < len(KEYS) + 1 and not worker.done():
            messages = await subscription.receive(10, 5)
            await subscription.ack(messages)
            got |= {(one := json.loads(message.body))["metadata"]["key"]: one["body"] for message in messages}
    signals.receive("SIGTERM")
    await worker
    assert got == {key: {"ran": key} for key in [*KEYS, "stored"]}
    async with open_subscription(settings.requests) as subscription:
        backlog = await subscription.backlog()
        assert (backlog.waiting, backlog.held) == (0, 0), "the test event was acked too"
