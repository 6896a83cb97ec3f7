"""A reverse proxy before LocalStack's S3, for what S3 promises and LocalStack does not keep; and for S3's refusals.

LocalStack completes two multipart uploads of one key with `If-None-Match: *` at once, and lets both win. S3 does not:
here one completion follows the other. And its second page of a listing is the first one again, and `start-after` is
compared with encoded keys, where keys have characters that it percent-encodes: here the gate makes the pages.
"""

import asyncio
import io
import threading
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable, Iterator
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, web
from cloud import environment
from yarl import URL

S3_XML = "{http://s3.amazonaws.com/doc/2006-03-01/}"
HOP = {"connection", "transfer-encoding", "keep-alive", "date", "server", "content-length"}
Rule = Callable[[web.Request], tuple[int, str] | None]


class S3Gate:
    """Forwards all requests but those that `refuse` answers: (status, code) for a request, or None."""

    def __init__(self, upstream: str) -> None:
        self.url = ""
        self.refuse: Rule | None = None
        self.region: str | None = None
        """What a refusal says of where the bucket is."""
        self.before: Callable[[web.Request], Awaitable[None]] | None = None
        """Awaited before a request is answered."""
        self.blanks = 0
        """How many blanks come in the middle of the answer to a completion, one every 0.2 s, as where it takes long."""
        self.stall_after: int | None = None
        """After how many bytes of an answer nothing more comes."""
        self.seen: list[str] = []
        self._upstream = upstream
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="s3-gate", daemon=True)

    def start(self) -> None:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self._completing = asyncio.Lock()
        self._session = ClientSession(
            auto_decompress=False, timeout=ClientTimeout(total=120), cookie_jar=DummyCookieJar()
        )
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(f"{request.method} {request.rel_url}")
        if self.before is not None:
            await self.before(request)
        if self.refuse is not None and (refusal := self.refuse(request)):
            status, code = refusal
            xml = f"<Error><Code>{code}</Code><Message>as the service says it</Message></Error>"
            headers = {"x-amz-bucket-region": self.region} if self.region else None
            return web.Response(status=status, text=xml, content_type="application/xml", headers=headers)
        if request.method == "POST" and "uploadId" in request.query:
            async with self._completing:
                return await self._forward(request)
        if request.query.get("list-type") == "2":
            return await self._page(request)
        return await self._forward(request)

    async def _page(self, request: web.Request) -> web.Response:
        """A page of a listing, made of the whole, whose order is right: what follows the token's key, as S3 counts."""
        asked = dict(request.query)
        size, token = min(int(asked.pop("max-keys", "1000")), 1000), asked.pop("continuation-token", "")
        first = asked.pop("start-after", "")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP}
        url = URL(self._upstream + request.rel_url.raw_path, encoded=True).with_query(asked | {"max-keys": "1000000"})
        async with self._session.get(url, headers=headers) as answer:
            body = await answer.read()
            if answer.status != 200:
                return web.Response(status=answer.status, body=body, content_type="application/xml")
        found = ElementTree.fromstring(body)
        objects = found.findall(f"{S3_XML}Contents")
        keys = [one.findtext(f"{S3_XML}Key", "") for one in objects]
        after = b64decode(token).decode()
        if after in keys:
            start = keys.index(after) + 1
        else:
            start = sum(unquote(key) <= max(unquote(after), first) for key in keys)
        for one in (*objects[:start], *objects[start + size :]):
            found.remove(one)
        if start + size < len(objects):
            found.find(f"{S3_XML}IsTruncated").text = "true"
            last = keys[start + size - 1].encode()
            ElementTree.SubElement(found, f"{S3_XML}NextContinuationToken").text = b64encode(last).decode()
        return web.Response(body=ElementTree.tostring(found), content_type="application/xml")

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP}
        body = io.BytesIO(await request.read())
        async with self._session.request(
            request.method,
            URL(self._upstream + str(request.rel_url), encoded=True),
            headers=headers,
            data=body,
            allow_redirects=False,
        ) as answer:
            response = web.StreamResponse(status=answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in HOP:
                    response.headers[name] = value
            response.content_length = int(answer.headers.get("Content-Length", 0))
            if self.blanks and request.method == "POST" and "uploadId" in request.query:
                return await self._slowly(request, response, await answer.read())
            await response.prepare(request)
            sent = 0
            async for chunk in answer.content.iter_chunked(1 << 16):
                if request.method == "HEAD":
                    continue
                if self.stall_after is not None and sent >= self.stall_after:
                    await asyncio.Event().wait()
                await response.write(chunk)
                sent += len(chunk)
            return response

    async def _slowly(self, request: web.Request, response: web.StreamResponse, body: bytes) -> web.StreamResponse:
        declaration, end, rest = body.partition(b"?>")
        response.content_length = len(body) + self.blanks
        await response.prepare(request)
        await response.write(declaration + end)
        for _ in range(self.blanks):
            await asyncio.sleep(0.2)
            await response.write(b" ")
        await response.write(rest)
        return response


@pytest.fixture
def s3_gate(aws: str) -> Iterator[S3Gate]:
    """S3 as it documents itself, and the environment names it."""
    gate = S3Gate(aws)
    gate.start()
    with environment({"AWS_ENDPOINT_URL_S3": gate.url}):
        yield gate
    gate.stop()
