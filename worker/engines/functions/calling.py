"""Three ways to run a function: for one request, for those of a batch, and as a stream."""

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol

from rejoinder.worker.engines.frames import encode
from rejoinder.worker.engines.functions.batches import Batches, BatchLimits
from rejoinder.worker.engines.functions.binding import Function
from rejoinder.worker.engines.functions.context import Context, Deployment
from rejoinder.worker.engines.functions.threads import Threads, Work
from rejoinder.worker.engines.protocol import EngineRequest

Task = asyncio.Task[Any]
Taken = tuple[Any, Context | None]
"""What a function gets of a request."""
AHEAD = 1000
"""Chunks that a sync generator may be ahead of the event loop."""


class Caller(Protocol):
    """Runs one function's requests."""

    function: Function

    async def serve(self, request: EngineRequest, task: Task) -> Any:
        """Run one request, of which `task` waits for the end. Raises what the function raises (`failures.carried`)."""


def _context(deployment: Deployment, body: Any, request: EngineRequest, task: Task) -> Context:
    return Context(
        body,
        deployment,
        path=request.path,
        headers=request.headers,
        response_id=request.response_id,
        created=request.created,
        task=task,
    )


class _Caller:
    def __init__(self, function: Function, deployment: Deployment, threads: Threads) -> None:
        self.function = function
        self._deployment = deployment
        self._threads = threads

    def _taken(self, request: EngineRequest, task: Task) -> Taken:
        """What the function gets of a request."""
        function = self.function
        body = request.body if function.check is None else function.check(request.body)
        return body, _context(self._deployment, request.body, request, task) if function.contextual else None


class Single(_Caller):
    """One call for each request.

    Args:
        function: What is called.
        deployment: What its contexts are of.
        threads: Where it is called unless it is async.
        lane: As many places as there may be calls at once.
    """

    def __init__(self, function: Function, deployment: Deployment, threads: Threads, lane: asyncio.Semaphore) -> None:
        super().__init__(function, deployment, threads)
        self._lane = lane
        self._loop = asyncio.get_running_loop()

    async def _enter(self, request: EngineRequest) -> None:
        """Take a place. What waits for one has not begun: its time does not run."""
        if request.waits is None or not self._lane.locked():
            await self._lane.acquire()
            return
        request.waits(True)
        await self._lane.acquire()
        request.waits(False)

    async def serve(self, request: EngineRequest, task: Task) -> Any:
        """See `Caller`."""
        function = self.function
        body, context = self._taken(request, task)
        try:
            await self._enter(request)
            if function.asynchronous:
                try:
                    return await self._awaited(function.call(body, context), request)
                finally:
                    self._lane.release()
            # The place is free when the thread is, which can be later than when nobody waits any more.
            result = await self._threads.run(
                lambda work: self._called(work, body, context, request), self._lane.release
            )
            if not _is_late(result):
                return result
            async with self._lane:
                return await self._awaited(result, request)
        except asyncio.CancelledError:
            if context is not None:
                context.cancel()
            raise

    async def _awaited(self, result: Any, request: EngineRequest) -> Any:  # noqa: ARG002  # a stream's needs it
        """On the event loop: the answer of an async function's call."""
        return self.function.give(await result)

    def _called(self, work: Work, body: Any, context: Context | None, request: EngineRequest) -> Any:  # noqa: ARG002
        """In a thread: the answer, or what is to be awaited of an async function in other clothes, such as a lambda."""
        result = self.function.call(body, context)
        return result if inspect.iscoroutine(result) else self.function.give(result)


def _is_late(result: Any) -> bool:
    """Whether a call turned out to be async only now: the rest of it belongs on the event loop."""
    return inspect.iscoroutine(result) or hasattr(result, "__aiter__")


class Streamed(Single):
    """One generator for each request. Its chunks are emitted as they come, and the answer is None."""

    async def _awaited(self, result: Any, request: EngineRequest) -> None:
        await self._emit(await result if inspect.iscoroutine(result) else result, _emit_of(request))

    async def _emit(self, chunks: AsyncIterator[Any], emit: Callable[[Any], None]) -> None:
        if not hasattr(chunks, "__aiter__"):
            raise _yields_nothing(chunks)
        give = self.function.give
        try:
            async for chunk in chunks:
                emit(give(chunk))
                # A generator that never waits would hold up the loop, and with it the chunks that it has given.
                await asyncio.sleep(0)
        finally:
            if (close := getattr(chunks, "aclose", None)) is not None:
                await close()

    def _called(self, work: Work, body: Any, context: Context | None, request: EngineRequest) -> Any:
        """In a thread: run a generator to its end, or until nobody wants its chunks."""
        emit, chunks = _emit_of(request), self.function.call(body, context)
        if _is_late(chunks):
            return chunks
        if isinstance(chunks, str | bytes | Mapping) or not hasattr(chunks, "__iter__"):
            raise _yields_nothing(chunks)
        call, give = self._loop.call_soon_threadsafe, self.function.give
        ahead = threading.Semaphore(AHEAD)
        try:
            for chunk in chunks:
                if work.cancelled:
                    break
                given = give(chunk)
                ahead.acquire()
                call(_deliver, work, emit, given, ahead)
        finally:
            if (close := getattr(chunks, "close", None)) is not None:
                close()
        return None


def _emit_of(request: EngineRequest) -> Callable[[Any], None]:
    assert request.emit is not None  # noqa: S101  # the engine's choice of this caller
    return request.emit


def _yields_nothing(value: Any) -> TypeError:
    return TypeError(f"generate_stream should yield chunks, or return what does: it returned {type(value).__name__}")


def _deliver(work: Work, emit: Callable[[Any], None], chunk: Any, ahead: threading.Semaphore) -> None:
    """On the event loop. Calls come in the order of the chunks, and before the one that ends the work."""
    ahead.release()
    if work.cancelled:
        return
    try:
        emit(chunk)
    except Exception as exc:  # noqa: BLE001  # too much waits to be sent, or the like: the request's error
        work.cancelled, work.failure = True, exc


class Together(_Caller):
    """One call for the requests of a batch.

    Args:
        function: What is called.
        deployment: What its contexts are of.
        threads: Where it is called unless it is async.
        limits: Of one batch.
        concurrency: Calls at once.
        linger: A cancelled request returns only when its call is over, if that is for nobody else.
    """

    def __init__(
        self,
        function: Function,
        deployment: Deployment,
        threads: Threads,
        limits: BatchLimits,
        concurrency: int,
        *,
        linger: bool,
    ) -> None:
        super().__init__(function, deployment, threads)
        key = function.key
        self.places = limits.size * (concurrency + 1)
        """Requests in calls, and as many as the next call takes."""
        self.size = limits.size
        self.steps = 0
        self.sequences = 0
        self._loop = asyncio.get_running_loop()
        self.batches: Batches[_Item] = Batches(
            self._call,
            limits,
            key=None if key is None else lambda item: key(*item.taken),
            concurrency=concurrency,
            linger=linger,
        )

    async def serve(self, request: EngineRequest, task: Task) -> Any:
        """See `Caller`."""
        item = _Item(self._taken(request, task), request.waits, self._loop)
        # Unknown where the request came over no pipe: then it is measured, if there is anything to share a call with.
        size = request.size or (_size(request.body) if self.size > 1 else 0)
        try:
            return await self.batches.submit(item, size)
        except asyncio.CancelledError:
            if item.taken[1] is not None:
                item.taken[1].cancel()
            raise
        finally:
            item.leave()

    async def _call(self, items: Sequence["_Item"]) -> Any:
        function = self.function
        self.steps += 1
        self.sequences += len(items)
        for item in items:
            item.begin()
        bodies, contexts = [item.taken[0] for item in items], [item.taken[1] for item in items]
        if function.asynchronous:
            return self._given(await function.call(bodies, contexts))
        # Even if nobody waits for it any more: the next call must not begin before this one's thread is free.
        answers: Any = await self._threads.run(lambda _: self._called(bodies, contexts), linger=True)
        return self._given(await answers) if inspect.iscoroutine(answers) else answers

    def _called(self, bodies: list[Any], contexts: list[Context | None]) -> Any:
        answers = self.function.call(bodies, contexts)
        return answers if inspect.iscoroutine(answers) else self._given(answers)

    def _given(self, answers: Any) -> Any:
        if not isinstance(answers, list | tuple):
            # One array for all is natural to return; what else there may be is refused by who counts the answers.
            if not callable(tolist := getattr(answers, "tolist", None)):
                return answers
            answers = tolist()
        return [self._one(answer) for answer in answers] if isinstance(answers, list | tuple) else answers

    def _one(self, answer: Any) -> Any:
        if isinstance(answer, BaseException):
            return answer
        try:
            return self.function.give(answer)
        except Exception as exc:  # noqa: BLE001  # one answer that is not JSON is no reason to fail the others
            return exc


class _Item:
    """One request of a batch. While it waits for its call for longer than a moment, its time does not run."""

    __slots__ = ("_said", "_timer", "_waits", "taken")

    MOMENT = 0.2
    """Seconds. Most calls begin sooner, and need no word about it."""

    def __init__(self, taken: Taken, waits: Callable[[bool], None] | None, loop: asyncio.AbstractEventLoop) -> None:
        self.taken = taken
        self._waits = waits
        self._said = False
        self._timer = None if waits is None else loop.call_later(self.MOMENT, self._wait)

    def _wait(self) -> None:
        assert self._waits is not None  # noqa: S101
        self._said = True
        self._waits(True)

    def begin(self) -> None:
        """Its call begins. Again, in a half of its batch: nothing changes."""
        self.leave()
        if self._said and self._waits is not None:
            self._said = False
            self._waits(False)

    def leave(self) -> None:
        """It waits no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _size(body: Any) -> int:
    """Bytes of a body as JSON, about. Not by `json.dumps`: that refuses integers of thousands of digits."""
    return len(encode({"body": body}))
