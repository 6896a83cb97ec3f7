"""A small HTTP server that answers as Cloud Storage's JSON API documents: objects, sessions, preconditions, hashes.

The emulator that is widely used, fake-gcs-server, forgets the precondition when a resumable session ends, and replaces
what stands there.
"""

import asyncio
import hashlib
import itertools
import json
import threading
import time
import uuid
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import unquote

import pytest
from aiohttp import web
from cloud import environment

QUANTUM = 256 << 10


@dataclass
class Object:
    content: bytes
    content_type: str
    generation: int
    kms_key: str | None
    updated: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z")


@dataclass
class Session:
    bucket: str
    described: dict
    params: dict
    content: bytearray = field(default_factory=bytearray)


class Refusal(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class GCSService:
    """Buckets in memory, served by a thread of its own: also to processes that block, and to others."""

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, Object]] = {}
        self.sessions: dict[str, Session] = {}
        self.refuse: tuple[int, str] | None = None
        """What every call is answered, until it is None again."""
        self.break_at: int | None = None
        """After how many bytes a download is cut."""
        self.url = ""
        self._generations = itertools.count(int(time.time() * 1e6))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gcs-service", daemon=True)

    def make_bucket(self) -> str:
        name = f"t-{uuid.uuid4().hex}"
        self.buckets[name] = {}
        return name

    def start(self) -> None:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        try:
            if self.refuse is not None:
                raise Refusal(*self.refuse)
            return await self._route(request)
        except Refusal as exc:
            error = {"code": exc.status, "message": exc.message, "errors": [{"message": exc.message}]}
            return web.json_response({"error": error}, status=exc.status)

    async def _route(self, request: web.Request) -> web.StreamResponse:
        path = request.rel_url.raw_path
        upload = path.startswith("/upload")
        _, _, rest = path.removeprefix("/upload").partition("/storage/v1/b/")
        bucket, _, name = rest.partition("/o")
        if bucket not in self.buckets:
            raise Refusal(404, "The specified bucket does not exist.")
        if upload:
            if request.method == "POST":
                return await self._begin(request, bucket)
            return await self._continue(request)
        if not name:
            return self._list(request, bucket)
        if request.method == "DELETE":
            return self._delete(bucket, unquote(name.removeprefix("/")))
        return await self._read(request, bucket, unquote(name.removeprefix("/")))

    def _list(self, request: web.Request, bucket: str) -> web.Response:
        """A page of the names after the token's, in their order; never more than 1,000, whatever is asked for."""
        size, after = min(int(request.query.get("maxResults", "1000")), 1000), request.query.get("pageToken", "")
        prefix = request.query.get("prefix", "")
        start = request.query.get("startOffset", "")  # inclusive
        of_prefix = (name for name in self.buckets[bucket] if name.startswith(prefix))
        names = sorted(name for name in of_prefix if name > after and name >= start)
        page: dict = {"kind": "storage#objects"}
        if names:  # an empty page has no field of this name
            page["items"] = [self._described(name, self.buckets[bucket][name]) for name in names[:size]]
        if len(names) > size:
            page["nextPageToken"] = names[size - 1]
        return web.json_response(page)

    def _delete(self, bucket: str, name: str) -> web.Response:
        if self.buckets[bucket].pop(name, None) is None:
            raise Refusal(404, f"No such object: {bucket}/{name}")
        return web.Response(status=204)

    async def _read(self, request: web.Request, bucket: str, name: str) -> web.StreamResponse:
        found = self.buckets[bucket].get(name)
        if found is None or request.query.get("generation", str(found.generation)) != str(found.generation):
            raise Refusal(404, f"No such object: {bucket}/{name}")
        if request.query.get("alt") != "media":
            return web.json_response(self._described(name, found))
        response = web.StreamResponse()
        response.content_length = len(found.content)
        await response.prepare(request)
        for start in range(0, len(found.content), 1 << 16):
            if self.break_at is not None and start >= self.break_at:
                assert request.transport
                request.transport.abort()
                break
            await response.write(found.content[start : start + (1 << 16)])
        return response

    async def _begin(self, request: web.Request, bucket: str) -> web.Response:
        kind, body = request.query["uploadType"], await request.read()
        params = dict(request.query)
        if kind == "resumable":
            self._check(bucket, params["name"], params)
            session = uuid.uuid4().hex
            self.sessions[session] = Session(bucket, json.loads(body), params)
            return web.Response(headers={"Location": f"{request.url.with_query(upload_id=session)}"})
        boundary = request.headers["Content-Type"].partition("boundary=")[2].encode()
        _, described, content = body.removesuffix(b"--\r\n").split(b"--" + boundary, 2)
        content = content.removesuffix(b"--" + boundary).removesuffix(b"\r\n").partition(b"\r\n\r\n")[2]
        fields = json.loads(described.partition(b"\r\n\r\n")[2])
        return self._finish(bucket, fields, params, content, fields.get("md5Hash"))

    async def _continue(self, request: web.Request) -> web.Response:
        upload_id = request.query["upload_id"]
        session = self.sessions.get(upload_id)
        if session is None:
            raise Refusal(410, "The upload session is gone.")
        if request.method == "DELETE":
            del self.sessions[upload_id]
            return web.Response(status=499)
        body = await request.read()
        span, _, total = request.headers["Content-Range"].removeprefix("bytes ").partition("/")
        if span != "*" and int(span.partition("-")[0]) != len(session.content):
            raise Refusal(400, "Invalid request. The range does not follow what was received.")
        if total == "*" and len(body) % QUANTUM:
            raise Refusal(400, "Invalid request. There were bytes that are no multiple of 256 KiB.")
        session.content += body
        if total == "*":
            return web.Response(status=308, headers={"Range": f"bytes=0-{len(session.content) - 1}"})
        if int(total) != len(session.content):
            raise Refusal(400, "Invalid request. The total is not what was received.")
        del self.sessions[upload_id]
        md5 = request.headers.get("X-Goog-Hash", "").removeprefix("md5=")
        return self._finish(session.bucket, session.described, session.params, bytes(session.content), md5)

    def _check(self, bucket: str, name: str, params: dict) -> None:
        if params.get("ifGenerationMatch") == "0" and name in self.buckets[bucket]:
            raise Refusal(412, "At least one of the pre-conditions you specified did not hold.")

    def _finish(self, bucket: str, fields: dict, params: dict, content: bytes, md5: str | None) -> web.Response:
        self._check(bucket, fields["name"], params)
        if md5 and md5 != _md5(content):
            raise Refusal(400, "Provided MD5 hash doesn't match calculated MD5 hash.")
        made = Object(content, fields["contentType"], next(self._generations), params.get("kmsKeyName"))
        self.buckets[bucket][fields["name"]] = made
        return web.json_response(self._described(fields["name"], made))

    def _described(self, name: str, found: Object) -> dict:
        return {
            "name": name,
            "size": str(len(found.content)),
            "generation": str(found.generation),
            "updated": found.updated,
            "contentType": found.content_type,
            "md5Hash": _md5(found.content),
        }


def _md5(content: bytes) -> str:
    return b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()


@pytest.fixture(scope="session")
def gcs() -> Iterator[GCSService]:
    """The service is up, and the environment names it."""
    service = GCSService()
    service.start()
    with environment({"STORAGE_EMULATOR_HOST": service.url}):
        yield service
    service.stop()
