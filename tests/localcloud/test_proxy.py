"""Each fault of the proxy, before a real echo server."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from local_cloud.services import localstack_ready, pubsub_ready
from proxy import HOST, Proxy

SHORT = 0.2
LIMIT = 60.0
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while chunk := await reader.read(65536):
            writer.write(chunk)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    server = await asyncio.start_server(echo, HOST, 0)
    async with server, Proxy(f"{HOST}:{server.sockets[0].getsockname()[1]}") as proxy:
        yield proxy


@contextlib.asynccontextmanager
async def connected(proxy: Proxy) -> AsyncIterator[Stream]:
    reader, writer = await asyncio.open_connection(HOST, proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def say(stream: Stream, data: bytes) -> bytes:
    """Send `data` and read as many bytes as come back, up to its length."""
    reader, writer = stream
    writer.write(data)
    await writer.drain()
    async with asyncio.timeout(LIMIT):
        return await reader.readexactly(len(data))


async def test_it_forwards_both_ways_and_passes_the_end_on(proxy: Proxy) -> None:
    data = bytes(range(256)) * 10_000
    async with connected(proxy) as (reader, writer):
        assert await say((reader, writer), data) == data
        writer.write_eof()
        async with asyncio.timeout(LIMIT):
            assert await reader.read() == b""
    assert proxy.accepted == 1


async def test_cut_closes_what_is_open_and_refuses_new_ones_until_restored(proxy: Proxy) -> None:
    port = proxy.port
    async with connected(proxy) as stream:
        assert await say(stream, b"before") == b"before"
        proxy.cut()
        assert proxy.connections == 0
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await say(stream, b"after")
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(HOST, port)
    proxy.restore()
    assert proxy.port == port
    async with connected(proxy) as stream:
        assert await say(stream, b"again") == b"again"


async def test_hang_accepts_and_forwards_nothing_until_restored(proxy: Proxy) -> None:
    async with connected(proxy) as old:
        assert await say(old, b"before") == b"before"
        proxy.hang()
        async with connected(proxy) as new:
            for reader, writer in (old, new):
                writer.write(b"held")
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(SHORT):
                        await reader.read(1)
            proxy.restore()
            for reader, _ in (old, new):
                async with asyncio.timeout(LIMIT):
                    assert await reader.readexactly(4) == b"held"


async def test_delay_holds_each_chunk(proxy: Proxy) -> None:
    async with connected(proxy) as stream:
        assert await say(stream, b"before") == b"before"
        proxy.delay(LIMIT)
        reader, writer = stream
        writer.write(b"slow")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SHORT):
                await reader.read(1)
    proxy.delay(0.05)
    async with connected(proxy) as stream:
        assert await say(stream, b"late") == b"late"


async def test_corrupt_changes_bytes_and_not_their_number(proxy: Proxy) -> None:
    async with connected(proxy) as stream:
        proxy.corrupt()
        assert await say(stream, b"a whole chunk") == b"a whol\x9a chun\x94"
    proxy.restore()
    async with connected(proxy) as stream:
        assert await say(stream, b"clean") == b"clean"


async def test_an_upstream_that_is_down_looks_so() -> None:
    server = await asyncio.start_server(echo, HOST, 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    async with Proxy(f"http://{HOST}:{port}") as proxy, connected(proxy) as stream:
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await say(stream, b"anyone?")


async def test_http_and_grpc_go_through_it_and_notice_a_cut(aws: str, gcp: str) -> None:
    async with Proxy(aws) as http, Proxy(gcp) as grpc:
        # `ready` is what waits for the emulators to come up: a call over HTTP, a call over gRPC
        for proxy, ready in ((http, localstack_ready), (grpc, pubsub_ready)):
            assert await asyncio.to_thread(ready, proxy.port)
            proxy.cut()
            assert not await asyncio.to_thread(ready, proxy.port)
            proxy.restore()
            assert await asyncio.to_thread(ready, proxy.port)
