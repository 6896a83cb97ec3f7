"""What goes over the wire to Pub/Sub: channels, calls, and what their failures mean.

The calls are gRPC's own on the messages of google-cloud-pubsub, without the generated client around them: that wraps
every message in a Python object of its own, which costs more than the call (docs/dependencies.md), and it retries.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import google.auth
import grpc
import grpc.aio
from google.api_core import grpc_helpers_async
from google.auth import exceptions as auth_errors
from google.auth.transport.requests import Request
from google.protobuf.empty_pb2 import Empty
from google.pubsub_v1.types import pubsub as types
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from rejoinder.adapters.errors import AdapterError, Denied, NotFound, TooLarge, Transient

EMULATOR = "PUBSUB_EMULATOR_HOST"
SERVICE = "pubsub.googleapis.com:443"
SCOPES = ("https://www.googleapis.com/auth/pubsub",)

CALL_SECONDS = 30.0
"""For any call but a pull: ten times what a slow one takes, and less than the shortest lease that is renewed in thirds
of Google's default of 60 s."""
WATCHDOG_SECONDS = 5.0
"""gRPC ends a call at its deadline. What has not ended this long after it is not going to."""

OPTIONS = (
    # A receive may bring a hundred messages of 10 MB.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # An exactly-once subscription names every ack id that failed in the trailers, of which gRPC takes 16 KB by default:
    # an answer that names more would be an error that names none.
    ("grpc.max_metadata_size", 4 * 1024 * 1024),
    # Channels to one address otherwise share one connection, and a large pull would hold up the heartbeats.
    ("grpc.use_local_subchannel_pool", 1),
    # A connection that has gone silent is noticed after this and `keepalive_time_ms`. A ping's own timeout is a minute
    # by default, and nothing is noticed before it.
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # After an outage it is back within seconds: gRPC's own backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # This is also how long one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    # Retrying is decided above the adapters.
    ("grpc.enable_retries", 0),
)
KEEPALIVE = ("grpc.keepalive_time_ms", 30_000)
"""As often as Google's own clients ping."""
EMULATOR_KEEPALIVE = ("grpc.keepalive_time_ms", 310_000)
"""The emulator is a plain gRPC server: it ends connections that ping an idle long poll more than once in 5 minutes."""

# Protobuf classes are made at run time, so no type checker knows them.
PullRequest: Any = types.PullRequest.pb()
PullResponse: Any = types.PullResponse.pb()
AcknowledgeRequest: Any = types.AcknowledgeRequest.pb()
ModifyAckDeadlineRequest: Any = types.ModifyAckDeadlineRequest.pb()
GetSubscriptionRequest: Any = types.GetSubscriptionRequest.pb()
SubscriptionInfo: Any = types.Subscription.pb()
PublishRequest: Any = types.PublishRequest.pb()
PublishResponse: Any = types.PublishResponse.pb()
PubsubMessage: Any = types.PubsubMessage.pb()
GetTopicRequest: Any = types.GetTopicRequest.pb()
TopicInfo: Any = types.Topic.pb()


@dataclass(frozen=True, slots=True)
class Method:
    """One of the service's calls."""

    path: str
    request: Any
    response: Any
    routed_by: str = "subscription"
    """The field of the request by which the service routes."""


PULL = Method("/google.pubsub.v1.Subscriber/Pull", PullRequest, PullResponse)
ACKNOWLEDGE = Method("/google.pubsub.v1.Subscriber/Acknowledge", AcknowledgeRequest, Empty)
MODIFY = Method("/google.pubsub.v1.Subscriber/ModifyAckDeadline", ModifyAckDeadlineRequest, Empty)
GET_SUBSCRIPTION = Method("/google.pubsub.v1.Subscriber/GetSubscription", GetSubscriptionRequest, SubscriptionInfo)
PUBLISH = Method("/google.pubsub.v1.Publisher/Publish", PublishRequest, PublishResponse, "topic")
GET_TOPIC = Method("/google.pubsub.v1.Publisher/GetTopic", GetTopicRequest, TopicInfo, "topic")

# Whatever is not here is Transient: unavailable, internal, aborted, throttled, unknown, cancelled by the server.
ERRORS: Mapping[grpc.StatusCode, type[AdapterError]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.PERMISSION_DENIED: Denied,
    grpc.StatusCode.UNAUTHENTICATED: Denied,
    # The subscription is detached, or pushes to somebody; somebody has to change it, and may.
    grpc.StatusCode.FAILED_PRECONDITION: Denied,
    # Everything else about a request is checked before it is sent.
    grpc.StatusCode.INVALID_ARGUMENT: Denied,
    grpc.StatusCode.OUT_OF_RANGE: Denied,
    grpc.StatusCode.UNIMPLEMENTED: Denied,
}
DETAILS = "grpc-status-details-bin"


def error(exc: grpc.aio.AioRpcError, name: str, permission: str) -> AdapterError:
    """Say what a failed call means. `name` is the subscription or topic, `permission` what the call needs."""
    code = exc.code()
    details = " ".join((exc.details() or "no details").split())
    if code is grpc.StatusCode.INVALID_ARGUMENT and ("size" in details or "too large" in details):
        return TooLarge(f"{name}: {details}")
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return Denied(f"{name}: grant {permission} to the identity that this runs as ({details})")
    return ERRORS.get(code, Transient)(f"{name}: {code.name}: {details}")


def ack_failures(exc: AdapterError) -> Mapping[str, str]:
    """Read what an exactly-once subscription says of each ack id that failed; empty for any other error."""
    rpc_error = exc.__cause__
    if isinstance(rpc_error, grpc.aio.AioRpcError):
        for key, value in rpc_error.trailing_metadata() or ():
            if key == DETAILS and isinstance(value, bytes):
                for detail in Status.FromString(value).details:
                    info = ErrorInfo()
                    if detail.Is(ErrorInfo.DESCRIPTOR) and detail.Unpack(info):
                        return dict(info.metadata)
    return {}


class Connection:
    """Channels to the service, on the event loop that made it: one for each kind of traffic."""

    def __init__(self, endpoint: str | None, credentials: Any) -> None:
        self._emulator = os.environ.get(EMULATOR)
        self._endpoint = endpoint or SERVICE
        self._credentials = credentials
        self._channels: list[grpc.aio.Channel] = []
        self.accepted = False
        """Whether the service has ever answered a call made with these credentials."""

    def channel(self) -> "Channel":
        """Open another connection. It is made when it is first used."""
        if self._emulator:
            channel = grpc.aio.insecure_channel(self._emulator, options=[*OPTIONS, EMULATOR_KEEPALIVE])
        else:
            channel = grpc_helpers_async.create_channel(
                self._endpoint, credentials=self._credentials, options=[*OPTIONS, KEEPALIVE]
            )
        self._channels.append(channel)
        return Channel(channel, self)

    async def close(self) -> None:
        """End all connections, and with them the calls that still run."""
        for channel in self._channels:
            await channel.close()


async def connect(endpoint: str | None) -> Connection:
    """Find the credentials and prepare connections: the emulator's where its variable is set.

    Raises:
        Denied: there are no credentials, or they are refused.
        Transient: whoever gives out tokens is away.
    """
    if os.environ.get(EMULATOR):
        return Connection(endpoint, None)
    # Both read files and may ask a metadata server: neither knows asyncio.
    try:
        async with asyncio.timeout(CALL_SECONDS):
            credentials, _ = await asyncio.to_thread(google.auth.default, scopes=SCOPES)
            await asyncio.to_thread(credentials.refresh, Request())
    except TimeoutError as exc:
        raise Transient(f"Google credentials: no answer in {CALL_SECONDS:g} s") from exc
    except auth_errors.GoogleAuthError as exc:
        raise auth_error(exc) from exc
    return Connection(endpoint, credentials)


def auth_error(exc: auth_errors.GoogleAuthError) -> AdapterError:
    """Say what it means that no token was to be had."""
    text = " ".join(str(exc).split())
    if isinstance(exc, auth_errors.TransportError) or exc.retryable:
        return Transient(f"Google credentials: {text}")
    return Denied(f"Google credentials: {text}")


class Channel:
    """One connection. A large answer on it delays whatever else runs on it, so each kind of traffic has its own."""

    def __init__(self, channel: grpc.aio.Channel, connection: Connection) -> None:
        self._channel = channel
        self._connection = connection

    def call(self, method: Method, resource: str, permission: str) -> Callable[[Any, float], Awaitable[Any]]:
        """Return a function (request, seconds) that makes this call about `resource`, which needs `permission`.

        It raises what `error` makes of a failure, with gRPC's own error as the cause; but credentials that were good
        are taken to be so again: whoever gives out tokens may be late with a new one.
        """
        stub: Any = self._channel.unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        name = f"gcppubsub://{resource}"
        # The service routes by this header; a generated client adds it.
        metadata = (("x-goog-request-params", f"{method.routed_by}={quote(resource)}"),)

        async def call(request: Any, seconds: float) -> Any:
            try:
                async with asyncio.timeout(seconds + WATCHDOG_SECONDS):
                    answer = await stub(request, timeout=seconds, metadata=metadata)
            except grpc.aio.AioRpcError as exc:
                failure = error(exc, name, permission)
                if exc.code() is grpc.StatusCode.UNAUTHENTICATED and self._connection.accepted:
                    failure = Transient(str(failure))
                raise failure from exc
            except TimeoutError as exc:
                raise Transient(f"{name}: no answer in {seconds:g} s") from exc
            if answer is None:  # gRPC's word for bytes that are no such message
                raise Transient(f"{name}: the answer cannot be read")
            self._connection.accepted = True
            return answer

        return call


def cause(exc: AdapterError) -> grpc.StatusCode | None:
    """Return the code of the failed call that `exc` tells of; None where there was no answer."""
    return exc.__cause__.code() if isinstance(exc.__cause__, grpc.aio.AioRpcError) else None
