"""The calls of one engine process: those that wait for their answer, and those that go on though nobody wants them."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rejoinder.worker import errors
from rejoinder.worker.engines.frames import Frame
from rejoinder.worker.engines.protocol import EngineRequest, WithHeaders
from rejoinder.worker.errors import Failed, RequestError, RetryableError

LATE_SECONDS = 1.0
"""A timer this late tells of a pause of the worker, in which the process may have been paused too."""

_KINDS: Mapping[str, type[RequestError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, RequestError)
}


class Interrupted(Exception):
    """Its process was ended for another's sake before it had an answer: it can be run again."""


def known(kind: type[RequestError]) -> str:
    """The name of an error's class as `Calls` knows it: of its nearest parent where it is somebody's own."""
    return next(parent.__name__ for parent in kind.__mro__ if _KINDS.get(parent.__name__) is parent)


@dataclass(slots=True, eq=False)
class Call:
    """One request in the process."""

    request: EngineRequest
    answer: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    emitted: bool = False
    """A chunk of its stream is out: run again, it would be another stream."""
    over: bool = False
    """The process has said that it does nothing for it any more."""
    timer: asyncio.TimerHandle | None = None


class Calls:
    """All calls in one process, by the numbers that the frames carry.

    Args:
        cancel: Called with the number of a call that nobody wants any more, for the process to be told.
        seconds: How long such a call may go on; None: as long as it likes.
        overdue: Called when one goes on for longer.
    """

    def __init__(self, cancel: Callable[[int], None], seconds: float | None, overdue: Callable[[], None]) -> None:
        self._cancel = cancel
        self._seconds = seconds
        self._overdue = overdue
        self._wanted: dict[int, Call] = {}
        self._unwanted: dict[int, Call] = {}

    def __iter__(self) -> Iterator[EngineRequest]:
        """What the process runs: with what nobody wants any more, for that can kill it too."""
        for calls in (self._wanted, self._unwanted):
            for call in calls.values():
                yield call.request

    def enter(self, number: int, request: EngineRequest) -> Call:
        """Begin a call; one `leave` must follow, whether it was answered or not."""
        call = self._wanted[number] = Call(request)
        return call

    def leave(self, number: int) -> None:
        """Nobody waits for its answer now. Where the process has not given one, it is told, and its time runs."""
        call = self._wanted.pop(number)
        if not call.over:
            self._unwanted[number] = call
            self._cancel(number)
            self._watch(call)

    def _watch(self, call: Call) -> None:
        if self._seconds is not None:
            loop = asyncio.get_running_loop()
            due = loop.time() + self._seconds
            call.timer = loop.call_at(due, self._due, call, due)

    def _due(self, call: Call, due: float) -> None:
        if asyncio.get_running_loop().time() - due > LATE_SECONDS:
            self._watch(call)
        else:
            self._overdue()

    def chunk(self, frame: Frame) -> None:
        """A chunk of a stream has come. One that cannot be taken ends its call."""
        call = self._wanted.get(frame["id"])
        if call is None or call.answer.done() or call.request.emit is None:
            return  # cancelled meanwhile
        call.emitted = True
        try:
            call.request.emit(frame["body"])
        except Exception as exc:  # noqa: BLE001  # whatever it is: it is this call's, not the connection's
            call.answer.set_exception(exc)

    def waiting(self, frame: Frame) -> None:
        """A call waits for others' sake, or its turn has come."""
        call = self._wanted.get(frame["id"])
        if call is not None and not call.answer.done() and call.request.waits is not None:
            call.request.waits(frame["waiting"])

    def settle(self, frame: Frame) -> None:
        """The process has said how a call ended."""
        call = self._wanted.get(frame["id"]) or self._unwanted.pop(frame["id"], None)
        if call is None:
            return
        call.over = True
        if call.timer is not None:
            call.timer.cancel()
        if call.answer.done():
            return  # cancelled meanwhile
        if frame["kind"] == "result":
            headers = frame.get("headers")
            call.answer.set_result(frame["body"] if headers is None else WithHeaders(frame["body"], headers))
        elif frame["kind"] == "ended":  # the engine has cancelled it by itself
            call.answer.set_exception(Failed("the engine failed on this request: CancelledError"))
        else:
            call.answer.set_exception(_error(frame))

    def lose(self, error: Callable[[Call], Exception]) -> None:
        """The process has ended, and with it all calls."""
        for calls in (self._wanted, self._unwanted):
            for call in calls.values():
                call.over = True
                if call.timer is not None:
                    call.timer.cancel()
        for call in self._wanted.values():
            if not call.answer.done():
                call.answer.set_exception(error(call))
        self._unwanted.clear()


def _error(frame: Frame) -> RequestError:
    kind = _KINDS.get(frame["error"], Failed)
    fields = {"param": frame["param"], "code": frame["code"]}
    if issubclass(kind, RetryableError):
        return kind(frame["message"], delay=frame.get("delay"), **fields)
    return kind(frame["message"], **fields)
