"""Small servers that refuse whatever they are asked, as the real services do. The emulators permit everything."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

HOST = "127.0.0.1"
WHO = "User: arn:aws:iam::000000000000:user/nobody"


@contextlib.asynccontextmanager
async def refusing_aws() -> AsyncIterator[str]:
    """SQS to a user without permissions; gives its URL."""
    body = json.dumps(
        {
            "__type": "com.amazon.coral.service#AccessDeniedException",
            "message": f"{WHO} is not authorized to perform: sqs:getqueueurl",
        }
    ).encode()
    head = (
        "HTTP/1.1 403 Forbidden\r\nContent-Type: application/x-amz-json-1.0\r\n"
        f"x-amzn-query-error: AccessDenied;Sender\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in asked.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.split(b":")[1]))
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, HOST, 0) as server:
        yield f"http://{HOST}:{server.sockets[0].getsockname()[1]}"


class _Refuse(grpc.GenericRpcHandler):
    def service(self, handler_call_details: Any) -> Any:
        async def refuse(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "User not authorized to perform this action.")
            raise AssertionError

        return grpc.unary_unary_rpc_method_handler(refuse)


@contextlib.asynccontextmanager
async def refusing_gcp() -> AsyncIterator[str]:
    """Pub/Sub to a service account without roles; gives its host:port."""
    server = grpc.aio.server(handlers=[_Refuse()])
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    yield f"{HOST}:{port}"
    await server.stop(None)
