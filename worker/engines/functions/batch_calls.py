"""One call of a batch, and what its outcome is to those who wait for it."""

import asyncio
from typing import Any

from rejoinder.worker.errors import Failed, RetryableError, Unavailable


class Call:
    """One call under way."""

    __slots__ = ("ended", "over", "runner", "wanted")

    def __init__(self, runner: "asyncio.Task[None]", wanted: int) -> None:
        self.runner = runner
        self.wanted = wanted  # answers that somebody still waits for
        self.over = False
        self.ended: asyncio.Future[None] | None = None

    def end(self) -> None:
        """It has ended, whichever way."""
        self.over = True
        if not self.wanted:
            self.runner.uncancel()  # it was this call that was cancelled, and the runner goes on
        if self.ended is not None:
            self.ended.set_result(None)

    async def wait(self) -> None:
        """Return when the call has ended, however often the caller is cancelled meanwhile."""
        self.ended = asyncio.get_running_loop().create_future()
        while not self.over:
            try:
                await asyncio.wait([self.ended])
            except asyncio.CancelledError:
                continue


def stopped() -> Unavailable:
    """For all that wait when nothing more is called."""
    return Unavailable("the function's engine is stopping")


def carried(error: BaseException) -> Exception:
    """What a task can raise without ending the event loop, or being taken for cancelled."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    failed = Failed(f"the function failed: {type(error).__name__}")
    failed.__cause__ = error
    return failed


class _Miscounted(Failed):
    """One of them may be why."""


def miscounted(answers: Any, count: int) -> Failed | None:
    """What is wrong with what a call returned, if they are not as many answers."""
    if not isinstance(answers, list | tuple):
        return _Miscounted(f"generate_batch returned {type(answers).__name__}, not a list of answers")
    if len(answers) != count:
        return _Miscounted(f"generate_batch returned {len(answers)} answers for {count} requests")
    return None


def concerns_all(error: BaseException) -> bool:
    """Whether a call failed for no item's sake: smaller ones would, too."""
    if not isinstance(error, RetryableError) or isinstance(error, _Miscounted):
        return False
    kinds = (*type(error).__mro__, *type(error.__cause__).__mro__)
    return not any(kind is MemoryError or kind.__name__ == "OutOfMemoryError" for kind in kinds)
