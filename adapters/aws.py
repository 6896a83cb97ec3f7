"""What the AWS adapters share: clients with connections of their own, and one place where their errors are mapped."""

import asyncio
import io
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Generic, TypeVar
from urllib.parse import urlsplit

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore.credentials import RefreshableCredentials
from botocore.loaders import create_loader

from rejoinder.adapters.aws_errors import from_exception
from rejoinder.adapters.errors import BadURL

ClientT = TypeVar("ClientT")
Answer = TypeVar("Answer")

CONNECT_SECONDS: Final = 5.0
"""To a host that is there, connecting takes milliseconds; one that is not is better known soon."""
SPARE_SECONDS: Final = 5.0
"""How much longer than its own timeouts a call may take before it counts as hung."""
POOL: Final = 16
"""Calls at once on one client. At 10 messages a call and 10 ms each this is 16,000 messages/s, more than one event loop
decodes."""
PIECE: Final = 1 << 18
"""Bytes of a request above which it is written piece by piece."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one client is for: how many calls at once, and how long the service may take to answer one."""

    calls: int
    answer_seconds: float


class Connections(Generic[ClientT]):
    """A client with connections of its own, so that no other kind of call can take them all."""

    def __init__(self, client: ClientT, traffic: Traffic, *, renewed: bool) -> None:
        self._client = client
        self._renewed = renewed
        # Waiting for a connection inside the SDK has no timeout and would count as the call's own time.
        self.slots = asyncio.Semaphore(traffic.calls)
        self._seconds = CONNECT_SECONDS + traffic.answer_seconds + SPARE_SECONDS

    async def run(
        self, permission: str, resource: str, call: Callable[[ClientT], Awaitable[Answer]], *, seconds: float = 0.0
    ) -> Answer:
        """Make one call, without retries.

        Args:
            permission: the IAM action that it needs, for the error's text.
            resource: the ARN or URL that it is made on, for the error's text.
            call: makes it, and reads its answer: one that lacks what it must have is `Transient` too.
            seconds: that the service is asked to take (a long poll's wait).

        Raises:
            AdapterError: whatever went wrong; Transient after the timeouts.
        """
        async with self.slots:
            return await self.run_held(permission, resource, call, seconds=seconds)

    async def run_held(
        self, permission: str, resource: str, call: Callable[[ClientT], Awaitable[Answer]], *, seconds: float = 0.0
    ) -> Answer:
        """Do as `run` for who holds one of `slots`, and keeps it while the answer's body is read."""
        with self.mapped(permission, resource):
            async with asyncio.timeout(self._seconds + seconds):
                return await call(self._client)

    @contextmanager
    def mapped(self, permission: str, resource: str) -> Iterator[None]:
        """Raise as AdapterError whatever the SDK raises: also an answer that was garbled on its way is its failure."""
        try:
            yield
        except Exception as exc:
            raise from_exception(exc, permission, resource, renewed=self._renewed) from exc


@cache
def _loader(data_path: str | None) -> Any:
    """The SDK's models of its services, which are read once: reading them takes longer than the rest of opening."""
    return create_loader(data_path)


class Vendor:
    """One vendor session: its chains of region and credentials, and the clients made of it."""

    def __init__(self, url: str, region: str | None, stack: AsyncExitStack, *, fips: bool = False) -> None:
        self._stack = stack
        self._fips = fips or None  # None: as the AWS configuration says
        self._session: Any = AioSession()  # typed by the name of each service there is, which is not known here
        try:
            found = region or self._session.get_config_variable("region")
            self._session.register_component("data_loader", _loader(self._session.get_config_variable("data_path")))
        except Exception as exc:
            raise from_exception(exc, "reading the AWS configuration", url) from exc
        if not found:
            raise BadURL(
                f"no region for {url!r}: add ?region=REGION, or set AWS_DEFAULT_REGION or the profile's region"
            )
        self.region: str = found

    async def connect(self, service: str, traffic: Traffic) -> Connections[Any]:
        """Make a client of `service` (`sqs`, `sns`, `s3`); it is closed with the stack.

        Raises:
            BadURL, Denied: the configuration names no usable endpoint, region or profile.
        """
        config = AioConfig(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=traffic.answer_seconds,
            max_pool_connections=traffic.calls,
            retries={"total_max_attempts": 1, "mode": "standard"},
            parameter_validation=False,  # they are all made by this package; checking them would slow each call
            tcp_keepalive=True,
            use_fips_endpoint=self._fips,
            warm_up_loader_caches=True,  # in a thread: reading the service's model takes 0.2 s
        )
        client = self._session.create_client(service, region_name=self.region, config=config)
        try:
            made = await self._stack.enter_async_context(client)
            credentials = await self._session.get_credentials()
        except ValueError as exc:
            raise BadURL(f"the endpoint of {service} is not usable (AWS_ENDPOINT_URL or the profile's): {exc}") from exc
        except Exception as exc:
            raise from_exception(exc, "connecting", f"{service} in {self.region}") from exc
        made.meta.events.register("before-send", _in_pieces)
        if service == "s3" and not (made.meta.config.s3 or {}).get("addressing_style"):
            made.meta.events.register("before-endpoint-resolution.s3", _by_path)
        return Connections(made, traffic, renewed=isinstance(credentials, RefreshableCredentials))


class _Body(io.BytesIO):
    """A request's body that aiohttp reads in pieces, and from its start where it sends it again.

    aiohttp asks for the length of the buffer, and a BytesIO would copy its bytes for that.
    """

    def getbuffer(self) -> memoryview:
        return memoryview(self.getvalue())


def _in_pieces(request: Any, **_: Any) -> None:
    """Let aiohttp write a large request piece by piece: as bytes it would do it in one step of the event loop."""
    body = request.body
    if isinstance(body, bytes) and len(body) > PIECE:
        request.body = _Body(body)
    elif isinstance(body, io.BytesIO):  # what the SDK makes of an object's bytes, which `getvalue` does not copy
        request.body = _Body(body.getvalue())


def _by_path(builtins: dict[str, Any], **_: Any) -> None:
    """Name the bucket in the path at an endpoint that is not Amazon's, where `bucket.HOST` is rarely a host."""
    host = urlsplit(builtins.get("SDK::Endpoint") or "").hostname
    if host and not host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        builtins["AWS::S3::ForcePathStyle"] = True
