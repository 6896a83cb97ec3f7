"""An event loop whose clock jumps to the next timer as soon as nothing is left to do: exact, and nobody waits."""

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its time begins at 0 and stands still while anything is ready to run."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self.settled: Callable[[], None] = lambda: None
        """Called whenever nothing is left to do at this time."""
        self.faults: list[Any] = []
        """What went wrong where nobody looks: all that asyncio would log."""
        self.set_exception_handler(lambda _, context: self.faults.append(context))
        real = self._selector.select

        def select(timeout):
            if timeout is None or timeout > 0:
                self.settled()
                assert timeout is not None or self._stopping, "everybody waits, and nothing will come"
                self._now += timeout
            return real(0)

        self._selector.select = select

    def time(self) -> float:
        return self._now


def in_virtual_time(main: Callable[[VirtualLoop], Awaitable[Any]]) -> Any:
    """Run to the end; whatever nobody heard of fails the test."""

    async def whole() -> Any:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        return await main(loop)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        result = runner.run(whole())
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        loop.settled = lambda: None
        faults = loop.faults
    assert not faults, faults
    return result


def virtually(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test in virtual time, by all clocks: what a busy machine delays ends no lease in it.

    For tests without threads, files, sockets and processes, for which virtual time would not wait.
    """

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def main(loop: VirtualLoop) -> None:
            began = time.time()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(time, "monotonic", loop.time)
                patch.setattr(time, "time", lambda: began + loop.time())
                await test(*args, **kwargs)

        in_virtual_time(main)

    return run
