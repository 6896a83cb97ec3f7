"""A small Pub/Sub service of our own, over real gRPC, for what the emulator does not do.

It answers as Google documents: a status for each stale ack id of an exactly-once subscription, permissions, the limits
of a request, answers that come late, connections that go silent. Messages are put into it directly or published.
"""

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any
from google.protobuf.empty_pb2 import Empty
from google.pubsub_v1.types import pubsub
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

SUBSCRIPTION = "projects/p/subscriptions/s"
TOPIC = "projects/p/topics/t"
DETAILS = "grpc-status-details-bin"


class Refusal(Exception):
    """What a handler raises to answer with a status."""

    def __init__(self, code: grpc.StatusCode, details: str, failures: dict[str, str] | None = None) -> None:
        super().__init__(details)
        self.code, self.details, self.failures = code, details, failures


@dataclass
class Service:
    """One subscription and one topic. Every hook that is set is asked first, with the request."""

    info: object = field(
        default_factory=lambda: pubsub.Subscription.pb()(name=SUBSCRIPTION, topic=TOPIC, ack_deadline_seconds=10)
    )
    hooks: dict[str, Callable[[object], Awaitable[None]]] = field(default_factory=dict)
    calls: list[tuple[str, object]] = field(default_factory=list)
    metadata: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    waiting: asyncio.Queue = field(default_factory=asyncio.Queue)
    held: dict[str, bytes] = field(default_factory=dict)
    """Body by ack id, of live leases."""
    address: str = ""
    """Where it is served, host:port."""
    pulling: int = 0
    deliveries: int = 0
    ids: collections.Counter = field(default_factory=collections.Counter)

    def requests(self, name: str) -> list:
        return [request for called, request in self.calls if called == name]

    async def GetSubscription(self, request):  # noqa: N802 - the service's own name, as below
        return self.info

    async def GetTopic(self, request):  # noqa: N802
        return pubsub.Topic.pb()(name=request.topic)

    async def Pull(self, request):  # noqa: N802
        response = pubsub.PullResponse.pb()()
        self.pulling += 1
        try:
            bodies = []
            if not request.return_immediately and self.waiting.empty():
                bodies.append(await self.waiting.get())
            while not self.waiting.empty() and len(bodies) < request.max_messages:
                bodies.append(self.waiting.get_nowait())
        finally:
            self.pulling -= 1
        for body in bodies:
            self.deliveries += 1
            ack_id = f"ack-{self.deliveries}"
            self.held[ack_id] = body
            response.received_messages.add(ack_id=ack_id, message={"data": body, "message_id": f"m-{body.decode()}"})
        return response

    async def Acknowledge(self, request):  # noqa: N802
        self._settle(request.ack_ids, 10)
        return Empty()

    async def ModifyAckDeadline(self, request):  # noqa: N802
        self._settle(request.ack_ids, request.ack_deadline_seconds)
        return Empty()

    def _settle(self, ack_ids, seconds) -> None:
        stale = {one: "PERMANENT_FAILURE_INVALID_ACK_ID" for one in ack_ids if one not in self.held}
        for one in ack_ids:
            if one in self.held and seconds == 0:
                self.waiting.put_nowait(self.held.pop(one))
        if stale and self.info.enable_exactly_once_delivery:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "some acknowledgement ids were invalid", stale)

    async def Publish(self, request):  # noqa: N802
        size = request.ByteSize()
        if size > 10_000_000 or len(request.messages) > 1_000:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"request of {size} bytes is too large")
        if len({message.ordering_key for message in request.messages}) > 1:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "all messages of a request must have one ordering key")
        ids = [f"p-{len(self.calls)}-{number}" for number in range(len(request.messages))]
        return pubsub.PublishResponse.pb()(message_ids=ids)


METHODS = {
    "google.pubsub.v1.Subscriber": {
        "GetSubscription": pubsub.GetSubscriptionRequest.pb(),
        "Pull": pubsub.PullRequest.pb(),
        "Acknowledge": pubsub.AcknowledgeRequest.pb(),
        "ModifyAckDeadline": pubsub.ModifyAckDeadlineRequest.pb(),
    },
    "google.pubsub.v1.Publisher": {"GetTopic": pubsub.GetTopicRequest.pb(), "Publish": pubsub.PublishRequest.pb()},
}


def _handler(service: Service, name: str, request_type) -> grpc.RpcMethodHandler:
    async def handle(request, context):
        service.calls.append((name, request))
        service.metadata.append((name, dict(context.invocation_metadata())))
        try:
            if hook := service.hooks.get(name):
                await hook(request)
            return await getattr(service, name)(request)
        except Refusal as refusal:
            if refusal.failures is not None:
                detail = Any()
                detail.Pack(ErrorInfo(reason="EXACTLY_ONCE", metadata=refusal.failures))
                status = Status(code=refusal.code.value[0], message=refusal.details, details=[detail])
                context.set_trailing_metadata(((DETAILS, status.SerializeToString()),))
            await context.abort(refusal.code, refusal.details)

    return grpc.unary_unary_rpc_method_handler(
        handle, request_deserializer=request_type.FromString, response_serializer=lambda one: one.SerializeToString()
    )


@contextlib.asynccontextmanager
async def serving(service: Service, credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[str]:
    """Serve on a free port, with TLS where there are `credentials`; gives host:port."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", -1),
            # Google's front ends allow the pings that their clients send; a plain server ends the connection.
            ("grpc.http2.min_ping_interval_without_data_ms", 1),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
    )
    for name, methods in METHODS.items():
        handlers = {method: _handler(service, method, request) for method, request in methods.items()}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    free = "127.0.0.1:0"
    port = server.add_secure_port(free, credentials) if credentials else server.add_insecure_port(free)
    service.address = f"127.0.0.1:{port}"
    await server.start()
    try:
        yield service.address
    finally:
        await server.stop(None)
