"""What the emulators lack: permissions. Servers that deny what they are told to, in the words of the services, and let
the emulators answer everything else."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import parse_qs

import aiohttp
import grpc
from aiohttp import web
from google.iam.v1.iam_policy_pb2 import TestIamPermissionsRequest, TestIamPermissionsResponse

USER = "User: arn:aws:iam::000000000000:user/worker is not authorized to perform: {action} on resource: {resource}"
SNS_DENIED = """<ErrorResponse xmlns="http://sns.amazonaws.com/doc/2010-03-31/"><Error><Type>Sender</Type>\
<Code>AuthorizationError</Code><Message>{message}</Message></Error><RequestId>0</RequestId></ErrorResponse>"""


@asynccontextmanager
async def denying_aws(emulator: str, *denied: str) -> AsyncIterator[str]:
    """A server whose SQS and SNS deny the operations `denied` (such as `SendMessageBatch`); gives its URL."""

    async def answer(request: web.Request) -> web.Response:
        body = await request.read()
        target = request.headers.get("X-Amz-Target", "")
        action = target.rpartition(".")[2] or parse_qs(body.decode()).get("Action", [""])[0]
        if action in denied and target:
            message = USER.format(action=f"sqs:{action.lower()}", resource="arn:aws:sqs:us-east-1:000000000000:q")
            error = {"__type": "com.amazon.coral.service#AccessDeniedException", "Message": message}
            return web.json_response(error, status=400, content_type="application/x-amz-json-1.0")
        if action in denied:
            message = USER.format(action=f"SNS:{action}", resource="arn:aws:sns:us-east-1:000000000000:t")
            return web.Response(text=SNS_DENIED.format(message=message), status=403, content_type="text/xml")
        async with session.post(emulator + request.path_qs, data=body, headers=request.headers) as real:
            kept = {name: real.headers[name] for name in ("Content-Type", "x-amzn-query-error") if name in real.headers}
            return web.Response(body=await real.read(), status=real.status, headers=kept)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    async with aiohttp.ClientSession() as session:
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


TEST = "/google.iam.v1.IAMPolicy/TestIamPermissions"


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, emulator: grpc.aio.Channel, granted: set[str], denied: tuple[str, ...]) -> None:
        self._emulator = emulator
        self._granted = granted
        self._denied = denied

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self._answer(details.method))

    def _answer(self, method: str) -> Callable:
        async def answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            if method == TEST:
                asked = TestIamPermissionsRequest.FromString(request).permissions
                return TestIamPermissionsResponse(permissions=self._granted & set(asked)).SerializeToString()
            if method.rpartition("/")[2] in self._denied:
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, "User not authorized to perform this action.")
            try:
                return await self._emulator.unary_unary(method)(request, timeout=10)
            except grpc.aio.AioRpcError as exc:
                await context.abort(exc.code(), exc.details() or "")

        return answer


@asynccontextmanager
async def denying_gcp(emulator: str, *denied: str, granted: set[str]) -> AsyncIterator[str]:
    """A Pub/Sub that has IAM: it denies the methods `denied`, and says that `granted` are the permissions there are."""
    async with grpc.aio.insecure_channel(emulator) as channel:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((_Handler(channel, granted, denied),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(None)
