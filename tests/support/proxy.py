"""A TCP proxy with faults, for tests of a broker's outage: HTTP and gRPC alike, since it knows bytes only."""

import asyncio
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import urlsplit

CHUNK = 65536
HOST = "127.0.0.1"
T = TypeVar("T")


class Proxy:
    """Stands before `upstream` (`host:port` or a URL) on a port of its own, which stays the same while it is cut.

    It runs on a thread and a loop of its own, so that it also serves clients that block theirs. All faults act on open
    and on new connections, from the call on; `restore` ends them all.

        async with Proxy(aws) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            proxy.cut()
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream if "://" in upstream else f"//{upstream}")
        assert parts.hostname, upstream
        assert parts.port, upstream
        self._upstream = (parts.hostname, parts.port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._flows: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._delay = 0.0
        self._corrupting = False
        self._answers_only = False
        self.port = 0
        """Where clients connect."""
        self.accepted = 0
        """How many connections clients have made so far."""
        self.broken = 0
        """How many of them ended without a goodbye."""

    @property
    def address(self) -> str:
        """`host:port`, as PUBSUB_EMULATOR_HOST wants it."""
        return f"{HOST}:{self.port}"

    @property
    def url(self) -> str:
        """The same as a URL, as AWS_ENDPOINT_URL wants it."""
        return f"http://{self.address}"

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return len(self._flows)

    def cut(self) -> None:
        """Close all connections, abruptly, and refuse new ones."""
        self._on_loop(self._close())

    def hang(self) -> None:
        """Accept connections and forward nothing; what is held back is forwarded at `restore`."""
        self._loop.call_soon_threadsafe(self._open.clear)
        self._settle()

    def delay(self, seconds: float) -> None:
        """Hold each chunk, in both directions, for `seconds` before it goes on."""
        self._delay = seconds

    def corrupt(self, *, answers_only: bool = False) -> None:
        """Flip the bits of one byte of each chunk: of its middle one towards upstream, of its last one back."""
        self._corrupting = True
        self._answers_only = answers_only

    def restore(self) -> None:
        """End all faults: listen again on the same port, and forward as it comes."""
        self._delay = 0.0
        self._corrupting = False
        self._loop.call_soon_threadsafe(self._open.set)
        self._on_loop(self._listen())

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # On another thread: a client that is still at work on this loop may be what keeps a connection open.
        await asyncio.to_thread(self.__exit__, kind, error, traceback)

    def __enter__(self) -> Self:
        self._thread.start()
        self._on_loop(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._on_loop(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _on_loop(self, work: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def _settle(self) -> None:
        """Wait until the loop has done what it was told before."""
        self._on_loop(asyncio.sleep(0))

    async def _listen(self) -> None:
        if self._server is None:
            # reuse_address: the port of a moment ago is ours again at once
            self._server = await asyncio.start_server(self._serve, HOST, self.port, reuse_address=True)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        flows = list(self._flows)
        for flow in flows:
            flow.cancel()
        await asyncio.gather(*flows, return_exceptions=True)

    def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        flow = self._loop.create_task(self._forward(reader, writer))
        self._flows.add(flow)
        flow.add_done_callback(self._flows.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._upstream)
            writers.append(far_writer)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, far_writer, towards_upstream=True))
                both.create_task(self._pump(far_reader, writer, towards_upstream=False))
            for each in writers:
                each.close()
                await each.wait_closed()
        except* OSError:
            self.broken += 1  # a side went away, or upstream is down: the other side sees a reset
        finally:
            for each in writers:
                each.transport.abort()  # nothing more once it is closed; a reset otherwise, as a cut line does

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, towards_upstream: bool
    ) -> None:
        while chunk := await reader.read(CHUNK):
            if self._delay:
                await asyncio.sleep(self._delay)
            await self._open.wait()
            if self._corrupting and not (towards_upstream and self._answers_only):
                place = len(chunk) // 2 if towards_upstream else len(chunk) - 1
                chunk = chunk[:place] + bytes([chunk[place] ^ 0xFF]) + chunk[place + 1 :]
            writer.write(chunk)
            await writer.drain()
        await self._open.wait()
        writer.write_eof()
