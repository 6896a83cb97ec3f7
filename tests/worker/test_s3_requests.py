"""S3 event notifications and pointers as requests, without a cloud: what each message is answered with."""

import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

import pytest
from worker_harness import Bench, GateEngine, bench, flaky, until_empty

from rejoinder.adapters import Blob, Message, NotFound, Transient, open_blobs
from rejoinder.worker.handler import response_id
from rejoinder.worker.stores import Stores

EVENTS = {"s3_event_path": "/run", "allow_input": "s3://bucket/in", "retry_delay_seconds": 0.01}


class Objects:
    """A store on S3 that is a dictionary; reading an exception raises it."""

    url = "s3://bucket/in"

    def __init__(self) -> None:
        self.objects: dict[str, list[Any]] = {}
        self.reads: list[str] = []

    def location(self, key: str) -> str:
        return f"{self.url}/{key}"

    @contextlib.asynccontextmanager
    async def read(self, key: str) -> AsyncIterator[Blob]:
        self.reads.append(key)
        found = self.objects.get(key, [NotFound("nothing")])
        data = found.pop(0) if len(found) > 1 else found[0]
        if isinstance(data, Exception):
            raise data

        async def chunks() -> AsyncIterator[bytes]:
            yield data

        yield Blob(len(data), None, chunks())


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> Objects:
    store = Objects()

    @contextlib.asynccontextmanager
    async def opening(url: str) -> AsyncIterator[Any]:
        if url.startswith("memory://"):  # of cancel marks
            async with open_blobs(url) as marks:
                yield marks
            return
        assert url == store.url
        yield store

    monkeypatch.setattr("rejoinder.worker.stores.open_blobs", opening)
    return store


@contextlib.asynccontextmanager
async def eager(**settings: Any) -> AsyncIterator[Bench]:
    engine = GateEngine()
    engine.open = True
    async with bench(engine, **{**EVENTS, **settings}) as it:
        yield it


def record(key: str, name: str = "ObjectCreated:Put", version: str = "2.1", **fields: Any) -> dict[str, Any]:
    s3 = {"bucket": {"name": "bucket"}, "object": {"key": key, "size": 3, "eTag": "e", "sequencer": "0"}}
    return {"eventVersion": version, "eventSource": "aws:s3", "eventName": name, "s3": s3, **fields}


def event(*records: dict[str, Any]) -> bytes:
    return json.dumps({"Records": records}).encode()


async def test_a_record_is_a_request(objects: Objects) -> None:
    objects.objects["a b+é.json"] = [b'"x"']
    async with eager(s3_event_metadata={"at": "{bucket}/{key}", "bytes": "{size}"}) as it:
        sent = await it.send_raw(event(record("in/a+b%2B%C3%A9.json")))
        (response,) = await it.responses_until(1)
        assert response == {
            "status_code": 200,
            "metadata": {"at": "bucket/in/a b+é.json", "bytes": 3},
            "body": {"ran": "x"},
        }
        attributes = it.got[0][1].attributes
        assert attributes["request_message_id"] == sent
        assert attributes["response_id"] == response_id(it.subscription.name, f"{sent}\0000", None)
        await until_empty(it)


async def test_each_record_of_a_message_is_answered(objects: Objects) -> None:
    objects.objects = {"a": [b"1"], "b": [b"{"], "c": [b"3"]}
    keys = ["in/a", "in/b", "in/missing", "out/x", "in/..%2Fx", "in/c"]
    records = [record(key) for key in keys]
    records += [record("in/a", version="3.0"), record("in/a", "ObjectRemoved:Delete"), record("in/a", eventSource="x")]
    async with eager() as it:
        sent = await it.send_raw(event(*records))
        await it.responses_until(9)
        by_name = {message.attributes["response_id"]: response for response, message in it.got}
        names = [response_id(it.subscription.name, f"{sent}\0{place}", None) for place in range(9)]
        answers = [by_name[name] for name in names]
        assert [one["status_code"] for one in answers] == [200, 400, 404, 403, 403, 200, 400, 400, 400]
        assert [one["metadata"] for one in answers[:4]] == [{"bucket": "bucket", "key": key} for key in keys[:4]]
        params = [one["body"]["error"]["param"] for one in answers[6:]]
        assert params == ["Records.6.eventVersion", "Records.7.eventName", "Records.8.eventSource"]
        await until_empty(it)


async def test_none_is_answered_while_one_is_to_be_tried_again(objects: Objects) -> None:
    objects.objects = {"a": [b"1"], "b": [Transient("away"), b"2"]}
    async with eager(max_attempts=3) as it:
        await it.send_raw(event(record("in/a"), record("in/b")))
        await it.responses_until(2)
        assert sorted(response["body"]["ran"] for response, _ in it.got) == [1, 2]
        assert {message.attributes["attempt"] for _, message in it.got} == {"2"}
        await until_empty(it)


async def test_after_the_last_attempt_all_are_answered(objects: Objects) -> None:
    objects.objects = {"a": [b"1"], "b": [Transient("away")], "c": [b"3"]}
    async with eager(max_attempts=2) as it:
        await it.send_raw(event(record("in/a"), record("in/b"), record("in/c")))
        await it.responses_until(3)
        assert sorted(response["status_code"] for response, _ in it.got) == [200, 200, 503]
        await until_empty(it)


async def test_the_test_event_is_acked_in_silence(objects: Objects) -> None:
    async with eager() as it:
        await it.send_raw(b'{"Service":"Amazon S3","Event":"s3:TestEvent","Bucket":"bucket"}')
        await until_empty(it)
        await it.send("next")
        (response,) = await it.responses_until(1)
        assert response["body"] == {"ran": "next"}


@pytest.mark.parametrize("body", [event(record("in/a")), b'{"Event":"s3:TestEvent"}'])
async def test_without_the_setting_an_event_is_no_request(objects: Objects, body: bytes) -> None:
    async with eager(s3_event_path=None) as it:
        await it.send_raw(body)
        (response,) = await it.responses_until(1)
        assert (response["status_code"], response["body"]["error"]["param"]) == (400, "metadata")
        assert "s3_event_path is not set" in response["body"]["error"]["message"]
        assert objects.reads == []


@pytest.mark.parametrize("own", ["output_path", "failure_path", "ledger", "cancels"])
async def test_what_the_worker_writes_is_no_job_of_its_own(
    objects: Objects, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    objects.objects = {"a": [b"1"], "out/a.out": [b"2"]}

    @contextlib.asynccontextmanager
    async def opening(url: str) -> AsyncIterator[Any]:
        if url == objects.url:
            yield objects
            return
        async with open_blobs(url.replace("s3://", f"memory://{uuid.uuid4()}-")) as written:
            monkeypatch.setattr(written, "url", url)  # which is what events name
            yield written

    monkeypatch.setattr("rejoinder.worker.stores.open_blobs", opening)
    async with eager(**{own: "s3://bucket/in/out"}) as it:
        await it.send_raw(event(record("in/out/a.out")))
        await until_empty(it)
        sent = await it.send_raw(event(record("in/out/a.out"), record("in/a"), record("in/outer")))
        await it.responses_until(2)
        names = {message.attributes["response_id"] for _, message in it.got}
        assert names == {response_id(it.subscription.name, f"{sent}\0{place}", None) for place in (1, 2)}
        assert sorted(objects.reads) == ["a", "outer"]


def test_the_nearest_store_says_whose_an_object_is(objects: Objects) -> None:
    wide = Objects()
    wide.url = "s3://bucket"
    stores = Stores(outputs=cast("Any", wide), inputs=(cast("Any", objects),))
    assert not stores.is_own("s3://bucket/in/a")
    assert stores.is_own("s3://bucket/inner/a")
    assert not stores.is_own("s3://bucket2/a")


@pytest.mark.parametrize("body", [b'{"Records": []}', b'{"Records": 1}', b'{"Event": "other"}', b"[]", b"{"])
async def test_what_is_no_event_is_400_as_ever(objects: Objects, body: bytes) -> None:
    async with eager() as it:
        await it.send_raw(body)
        (response,) = await it.responses_until(1)
        assert response["status_code"] == 400


# ---------------------------------------------------------------------- messages that are stored elsewhere


@contextlib.asynccontextmanager
async def pointing(monkeypatch: pytest.MonkeyPatch, location: str, **settings: Any) -> AsyncIterator[Bench]:
    """A worker whose requests all are pointers to `location`."""
    engine = GateEngine()
    engine.open = True
    settings = {**EVENTS, **settings}
    async with bench(engine, start=False, **settings) as it, flaky(it, monkeypatch) as (subscription, _):

        async def receive(limit: int, wait: float) -> list[Message]:
            return [replace(one, body=b"", stored_at=location) for one in await subscription.inner.receive(limit, wait)]

        subscription.receive = receive
        it.start()
        await it.send_raw(b"a pointer")
        yield it


REQUEST = b'{"path": "/run", "metadata": {"n": 7}, "body": "stored"}'


async def test_a_stored_request_is_run(monkeypatch: pytest.MonkeyPatch, objects: Objects) -> None:
    objects.objects["request é"] = [REQUEST]
    async with pointing(monkeypatch, "s3://bucket/in/request é") as it:
        (response,) = await it.responses_until(1)
        assert response == {"status_code": 200, "metadata": {"n": 7}, "body": {"ran": "stored"}}


async def test_a_stored_request_may_name_its_input(monkeypatch: pytest.MonkeyPatch, objects: Objects) -> None:
    objects.objects["request"] = [b'{"path": "/run", "metadata": {}, "input_location": "s3://bucket/in/input"}']
    objects.objects["input"] = [b'"there"']
    # As if the request alone filled the memory: what waits for its input gives back what the request has.
    monkeypatch.setattr("rejoinder.worker.inputs.MAX_HELD_INPUTS", 1)
    async with pointing(monkeypatch, "s3://bucket/in/request") as it:
        (response,) = await it.responses_until(1)
        assert (response["status_code"], response["body"]) == (200, {"ran": "there"})


async def test_a_stored_event_is_an_event(monkeypatch: pytest.MonkeyPatch, objects: Objects) -> None:
    objects.objects = {"event": [event(record("in/a"), record("in/b"))], "a": [b"1"], "b": [b"2"]}
    async with pointing(monkeypatch, "s3://bucket/in/event") as it:
        await it.responses_until(2)
        assert sorted(response["body"]["ran"] for response, _ in it.got) == [1, 2]


@pytest.mark.parametrize(
    ("location", "stored", "status_code"),
    [
        ("s3://bucket/out/request", REQUEST, 403),
        ("s3://other/in/request", REQUEST, 403),
        ("s3://bucket/in/../request", REQUEST, 403),
        ("s3://bucket/in/missing", REQUEST, 404),
        ("s3://bucket/in/request", b"x" * 1001, 413),
        ("s3://bucket/in/request", b"{", 400),
        ("s3://bucket/in/request", b"", 400),
        ("s3://bucket/in/request", Transient("away"), 503),
    ],
)
async def test_a_stored_request_that_cannot_be_read(monkeypatch, objects, location, stored, status_code) -> None:
    objects.objects["request"] = [stored]
    async with pointing(monkeypatch, location, max_request_bytes=1000, max_attempts=2) as it:
        (response,) = await it.responses_until(1)
        assert (response["status_code"], response["metadata"]) == (status_code, None)
        assert (objects.reads == []) == (status_code == 403)
        assert it.engine.started == []
        await until_empty(it)
