"""Bodies by location: what is read as what, and what each wrong location, object or size is answered with."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from worker_harness import Bench, GateEngine, bench, until, until_empty

from rejoinder.adapters import Blob, Denied, NotFound, Transient, open_blobs

KEYS = ["plain.json", "a b/c d.json", "a+b/50%.json", "a%2Fb %2e%2e.json", "é/日本/😀.json", "q?a=1&b#frag.json"]


def opened(**settings: Any) -> Any:
    """A worker that answers whatever it is asked."""
    engine = GateEngine()
    engine.open = True
    return bench(engine, **settings)


async def put(location: str, data: bytes, content_type: str = "application/octet-stream") -> None:
    async def once() -> AsyncIterator[bytes]:
        yield data

    store, _, key = location.rpartition("/")
    async with open_blobs(store) as blobs:
        assert await blobs.put(key, once(), content_type)


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store."""
    return f"memory://inputs-{uuid4().hex}/in" if request.param == "memory" else f"file://{tmp_path}/in"


async def ask(it: Bench, location: str, **fields: Any) -> dict[str, Any]:
    """Send one request with an input location; return its response."""
    count = len(it.got)
    envelope = {"path": "/run", "metadata": {"n": count}, "input_location": location, **fields}
    await it.send_raw(json.dumps(envelope).encode())
    response = (await it.responses_until(count + 1))[count]
    assert response["metadata"] == {"n": count}
    return response


def error_of(response: dict[str, Any]) -> dict[str, Any]:
    error = response["body"]["error"]
    assert isinstance(error, dict)
    assert "\n" not in error["message"]
    return error


async def test_a_body_is_read_whatever_its_key(store: str) -> None:
    async with opened(allow_input=store) as it:
        for number, key in enumerate(KEYS):
            body = {"number": number, "big": 2**80}
            async with open_blobs(store) as blobs:
                assert blobs.location(key) == f"{store}/{key}"
            await put(f"{store}/{key}", json.dumps(body).encode())
            response = await ask(it, f"{store}/{key}")
            assert (response["status_code"], response["body"]) == (200, {"ran": body})


@pytest.mark.parametrize(
    ("key", "stored", "asked", "data", "body"),
    [
        ("a", "application/json", None, b'"x"', "x"),
        ("a", "Application/JSON; charset=UTF-8", None, b'"x"', "x"),
        ("a", "", None, b'"x"', "x"),
        ("a", "binary/octet-stream", None, b"[1]", [1]),
        ("a.txt", "binary/octet-stream", None, b'"x"', '"x"'),
        ("a.json", "text/plain", None, b'"x"', "x"),
        ("a.json", "text/html", None, b'"x"', '"x"'),
        ("a.json", "application/json", "text/plain", b'"x"', '"x"'),
        ("a.txt", "text/plain", "application/json", b'"x"', "x"),
        ("a", "text/csv; charset=utf-8", None, "é\n".encode(), "é\n"),
    ],
)
async def test_what_an_object_is_read_as(key, stored, asked, data, body) -> None:
    location = f"memory://inputs-{uuid4().hex}/{key}"
    await put(location, data, stored)
    async with opened(allow_input=location.rpartition("/")[0]) as it:
        response = await ask(it, location, options={"content_type": asked} if asked else None)
        assert (response["status_code"], response["body"]) == (200, {"ran": body})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"prompt": "x"', "is not JSON: Expecting ',' delimiter at character 14"),
        (b'{"prompt": ', "is not JSON: it ends too early"),
        (b"[1] [2]", "is not JSON: more follows its value"),
        (b'{"a": NaN}', "is not JSON: NaN is not a JSON value"),
        (b'{"a": {"b": 1, "b": 2}}', "has a duplicate key: 'b'"),
        (b"[" * 200 + b"]" * 200, "nests deeper than 128 levels"),
        ('{"prompt": "x"}'.encode("utf-16"), "is not UTF-8"),
        ('{"prompt": "é"}'.encode("latin-1"), "is not UTF-8"),
        (b"\xff" * 300_000, "is not UTF-8"),
        (b'\xef\xbb\xbf{"prompt": "x"}', "it begins with a byte order mark"),
        (b"", "is empty"),
        (b" \n", "is not JSON: it is empty"),
        (b"1e999", "too large for a double"),
    ],
)
async def test_what_is_not_json_is_400(store: str, data: bytes, message: str) -> None:
    await put(f"{store}/input", data)
    async with opened(allow_input=store) as it:
        response = await ask(it, f"{store}/input")
        assert response["status_code"] == 400
        error = error_of(response)
        assert error["param"] == "input_location"
        assert f"{store}/input" in error["message"]
        assert message in error["message"]


@pytest.mark.parametrize(
    ("stored", "asked", "param", "message"),
    [
        ("image/png", None, "input_location", "content_type 'image/png' of the input is not supported"),
        ("", "image/png", "options.content_type", "application/jsonl"),
        ("text/plain; charset=latin-1", None, "input_location", "only UTF-8 is read"),
        ("", "application/json; charset=utf-16", "options.content_type", "only UTF-8 is read"),
        ("application/jsonl", None, "input_location", "this worker has no store for results"),
    ],
)
async def test_content_types_that_cannot_be_read_are_400(stored, asked, param, message) -> None:
    location = f"memory://inputs-{uuid4().hex}/key"
    await put(location, b"{}", stored)
    async with opened(allow_input=location.rpartition("/")[0]) as it:
        response = await ask(it, location, options={"content_type": asked} if asked else None)
        assert response["status_code"] == 400
        assert error_of(response)["param"] == param
        assert message in error_of(response)["message"]


async def test_what_is_not_there_is_404(store: str) -> None:
    async with opened(allow_input=store) as it:
        response = await ask(it, f"{store}/missing.json")
        assert response["status_code"] == 404
        assert error_of(response)["param"] == "input_location"


async def test_ten_gigabytes_are_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(10 << 30)
    async with opened(allow_input=f"file://{tmp_path}") as it:
        response = await asyncio.wait_for(ask(it, f"file://{tmp_path}/huge.json"), 60)
        assert response["status_code"] == 413
        assert f"has {10 << 30} bytes" in error_of(response)["message"]


async def test_limits_of_size_are_exact(store: str) -> None:
    await put(f"{store}/fits", json.dumps("x" * 98).encode())
    await put(f"{store}/larger", json.dumps("x" * 99).encode())
    async with opened(allow_input=store, max_input_bytes=100) as it:
        assert (await ask(it, f"{store}/fits"))["status_code"] == 200
        assert (await ask(it, f"{store}/larger"))["status_code"] == 413


class Odd:
    """A store that is not as it should be."""

    url = "memory://odd"

    def __init__(self, *, size: int = 10, failure: Exception | None = None) -> None:
        self.size = size
        self.failure = failure
        self.reads = 0

    def location(self, key: str) -> str:
        return f"{self.url}/{key}"

    def read(self, key: str) -> "Odd":
        return self

    async def __aenter__(self) -> Blob:
        self.reads += 1
        if self.failure is not None:
            raise self.failure
        return Blob(self.size, None, self.chunks())

    async def __aexit__(self, *_: object) -> None:
        """Nothing to close."""

    async def chunks(self) -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 100
            await asyncio.sleep(0)


def odd(monkeypatch: pytest.MonkeyPatch, store: Odd) -> Odd:
    import contextlib

    @contextlib.asynccontextmanager
    async def opening(url: str) -> AsyncIterator[Any]:
        yield store

    monkeypatch.setattr("rejoinder.worker.stores.open_blobs", opening)
    return store


async def test_what_is_longer_than_its_store_says_is_413(monkeypatch: pytest.MonkeyPatch) -> None:
    odd(monkeypatch, Odd())
    async with opened(allow_input="memory://odd", max_input_bytes=1000) as it:
        assert (await ask(it, "memory://odd/x"))["status_code"] == 413


@pytest.mark.parametrize(
    ("failure", "status_code", "reads"),
    [(Denied("no"), 403, 1), (NotFound("nothing"), 404, 1), (Transient("away"), 503, 3)],
)
async def test_what_the_store_says_is_a_status(monkeypatch, failure, status_code, reads) -> None:
    store = odd(monkeypatch, Odd(failure=failure))
    async with opened(allow_input="memory://odd", max_attempts=3, retry_delay_seconds=0.01) as it:
        assert (await ask(it, "memory://odd/x"))["status_code"] == status_code
        assert store.reads == reads
        await until_empty(it)


# ---------------------------------------------------------------------- what is not allowed


@pytest.fixture
async def trap() -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that nobody may ask: its address, and what it was asked."""
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", asked


@pytest.mark.parametrize(
    "location",
    [
        "{root}/../secret.json",
        "{root}/x/../../secret.json",
        "{root}/./x.json",
        "{root}//x.json",
        "{root}/",
        "{root}",
        "{root}x/x.json",
        "{parent}/secret.json",
        "{root}/%2e%2e/secret.json",
        "{root}/..%2fsecret.json",
        "{root}/x/..\\..\\secret.json",
        "{root}/x/..%5C..%5Csecret.json",
        "{root}/%2E./secret.json",
        "{root}/x.json/",
        "{root}/x.json/..",
        "{root}?x=/x.json",
        "{root}#/x.json",
        "{root}%2Fx.json",
        "{root}/link/secret.json",
        "{root}/link.json",
        "FILE{path}/x.json",
        "file://localhost{path}/x.json",
        "{path}/x.json",
        "s3://bucket/x.json",
        "gs://bucket/x.json",
        "memory://other/x.json",
        "http://{trap}/x.json",
        "https://{trap}/x.json",
        "http://169.254.169.254/latest/meta-data/",
        "http://[fd00:ec2::254]/latest/meta-data/",
        "data:application/json,1",
        "\u202e{root}/x.json",
        "{root}/x.json\n{root}/x.json",
        "{root}/x\u0000.json",
    ],
)
async def test_what_is_not_allowed_is_403_and_asks_nobody(tmp_path, trap, monkeypatch, location) -> None:
    address, asked = trap
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
    monkeypatch.setenv("HTTP_PROXY", f"http://{address}")
    monkeypatch.setenv("HTTPS_PROXY", f"http://{address}")
    names: list[Any] = []
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kw: names.append(args) or resolve(*args, **kw))
    root = tmp_path / "in"
    root.mkdir()
    (root / "x.json").write_text('"allowed"')
    (tmp_path / "secret.json").write_text('"secret"')
    (root / "link").symlink_to(tmp_path)
    (root / "link.json").symlink_to(tmp_path / "secret.json")
    parts = {"root": f"file://{root}", "path": str(root), "parent": f"file://{tmp_path}", "trap": address}
    async with opened(allow_input=f"file://{root}") as it:
        response = await ask(it, location.format(**parts))
        assert response["status_code"] == 403
        assert error_of(response)["param"] == "input_location"
        assert (await ask(it, f"file://{root}/x.json"))["body"] == {"ran": "allowed"}
    assert (asked, names) == ([], [])


async def test_by_default_only_blobs_may_be_read_from(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    for place in (tmp_path / "blobs" / "x.json", tmp_path / "x.json"):
        place.write_text("1")
    async with opened(blobs=f"file://{tmp_path}/blobs") as it:
        assert (await ask(it, f"file://{tmp_path}/blobs/x.json"))["status_code"] == 200
        assert (await ask(it, f"file://{tmp_path}/x.json"))["status_code"] == 403
    async with opened() as it:
        response = await ask(it, f"file://{tmp_path}/blobs/x.json")
        assert response["status_code"] == 403
        assert "this worker reads from no store" in error_of(response)["message"]


# ---------------------------------------------------------------------- beside the engine


async def test_inputs_in_memory_are_bounded_and_wait_for_each_other(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rejoinder.worker.inputs.MAX_HELD_INPUTS", 250)
    for name in "abc":
        (tmp_path / name).write_text(json.dumps(name * 98))
    engine = GateEngine(capacity=4)
    async with bench(engine, allow_input=f"file://{tmp_path}") as it:
        for name in "abc":
            fields = {"path": "/run", "metadata": {}, "input_location": f"file://{tmp_path}/{name}"}
            await it.send_raw(json.dumps(fields).encode())
        await until(lambda: len(engine.started) == 2)
        for _ in range(20):
            await asyncio.sleep(0.005)
        first, second = engine.started
        assert len(engine.started) == 2, "the third has no room yet"
        engine.release(first)
        await until(lambda: len(engine.started) == 3)
        engine.open = True
        engine.release(second)
        engine.release(engine.started[2])
        assert {response["status_code"] for response in await it.responses_until(3)} == {200}
        await until_empty(it)


async def test_what_expired_while_its_input_was_read_is_408(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("1")
    now = [0.0]
    real = __import__("time").time
    monkeypatch.setattr("rejoinder.worker.handler.time.time", lambda: real() + now[0])

    from rejoinder.worker.inputs import Inputs

    body = Inputs.body

    async def slow(self: Any, *args: Any) -> Any:
        now[0] = 61.0  # as if reading took a minute
        return await body(self, *args)

    monkeypatch.setattr(Inputs, "body", slow)
    async with opened(allow_input=f"file://{tmp_path}") as it:
        response = await ask(it, f"file://{tmp_path}/x.json", options={"request_ttl_seconds": 60})
        assert response["status_code"] == 408
        assert it.engine.started == []
