"""A small HTTP server that answers as SQS and SNS document, for what LocalStack never says: refusals and faults."""

import json
from collections.abc import Callable, Mapping
from typing import Any
from xml.sax.saxutils import escape

import pytest
from aiohttp import web

ARN = "arn:aws:sqs:us-east-1:000000000000:q"
TOPIC = "arn:aws:sns:us-east-1:000000000000:t"
ATTRIBUTES = {"QueueArn": ARN, "VisibilityTimeout": "30", "MaximumMessageSize": "1048576"}

Handler = Callable[[Mapping[str, Any]], Any]


class Refusal(Exception):
    """What the service answers instead of success."""

    def __init__(self, code: str, status: int = 400, message: str = "as the service says it") -> None:
        super().__init__(code)
        self.code, self.status, self.message = code, status, message


class StandIn:
    """One service whose operations are functions: `stand_in.on["SendMessageBatch"] = handler`.

    A handler gets the request's fields and returns the answer's, or raises `Refusal`, or returns a `web.Response`.
    """

    def __init__(self) -> None:
        self.on: dict[str, Handler] = {
            "GetQueueUrl": lambda _: {"QueueUrl": "https://sqs.us-east-1.amazonaws.com/000000000000/q"},
            "GetQueueAttributes": lambda _: {"Attributes": ATTRIBUTES},
            "GetTopicAttributes": lambda _: {"Attributes": {}},
        }
        self.calls: list[tuple[str, Mapping[str, Any]]] = []

    def called(self, operation: str) -> list[Mapping[str, Any]]:
        return [fields for name, fields in self.calls if name == operation]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        target = request.headers.get("X-Amz-Target")
        if target is None:
            return await self._query(request)
        operation, fields = target.partition(".")[2], await request.json()
        self.calls.append((operation, fields))
        try:
            answer = await self._run(operation, fields, request)
        except Refusal as exc:
            body = json.dumps({"__type": f"com.amazonaws.sqs#{exc.code}", "message": exc.message})
            return web.Response(status=exc.status, text=body, content_type="application/x-amz-json-1.0")
        if isinstance(answer, web.StreamResponse):
            return answer
        return web.Response(text=json.dumps(answer), content_type="application/x-amz-json-1.0")

    async def _query(self, request: web.Request) -> web.StreamResponse:
        fields = dict(await request.post())
        operation = str(fields["Action"])
        self.calls.append((operation, fields))
        try:
            answer = await self._run(operation, fields, request)
        except Refusal as exc:
            body = f"<Code>{exc.code}</Code><Message>{escape(exc.message)}</Message><Type>Sender</Type>"
            xml = f"<ErrorResponse><Error>{body}</Error><RequestId>r</RequestId></ErrorResponse>"
            return web.Response(status=exc.status, text=xml, content_type="text/xml")
        if isinstance(answer, web.StreamResponse):
            return answer
        xml = f"<{operation}Response><{operation}Result>{_xml(answer)}</{operation}Result></{operation}Response>"
        return web.Response(text=xml, content_type="text/xml")

    async def _run(self, operation: str, fields: Mapping[str, Any], request: web.Request) -> Any:
        answer = self.on[operation](fields)
        return await answer(request) if callable(answer) else answer


def _xml(answer: Any) -> str:
    if isinstance(answer, dict):
        return "".join(f"<{name}>{_xml(value)}</{name}>" for name, value in answer.items())
    if isinstance(answer, list):
        return "".join(f"<member>{_xml(value)}</member>" for value in answer)
    return escape(str(answer))


@pytest.fixture
async def stand_in(monkeypatch, tmp_path):
    """A stand-in that the environment names, with credentials and a region."""
    server = StandIn()
    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/{path:.*}", server.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    bare_environment(monkeypatch, tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for name, value in {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield server
    await runner.cleanup()


def bare_environment(monkeypatch, tmp_path) -> None:
    """No AWS configuration at all: neither variables, nor files, nor a metadata service."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "DEFAULT_REGION", "REGION", "PROFILE"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def received(count, attributes=None):
    return {
        "Messages": [
            {"MessageId": f"m{number}", "ReceiptHandle": f"r{number}", "Body": "x", "Attributes": attributes or {}}
            for number in range(count)
        ]
    }


def failing(answers):
    """An answer of a batch whose entries fail as `answers` says by their receipt handle: (code, sender's fault)."""

    def handler(fields):
        failed, successful = [], []
        for entry in fields["Entries"]:
            code = answers.get(entry["ReceiptHandle"])
            if code is None:
                successful.append({"Id": entry["Id"]})
            elif code != "untold":
                text = "Value r for parameter ReceiptHandle is invalid. Reason: because."
                failed.append({"Id": entry["Id"], "Code": code[0], "SenderFault": code[1], "Message": text})
        return {"Successful": successful, "Failed": failed}

    return handler
