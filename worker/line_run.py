"""One job of JSON lines under way: its lines are read, run side by side, and their results handed on in order."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from rejoinder.schemas.errors import ErrorBody, ErrorDetail
from rejoinder.schemas.values import read_value
from rejoinder.schemas.wire import WireError, write_json
from rejoinder.worker.errors import BadRequest, RequestError, RequestTooLarge
from rejoinder.worker.handler import Answer, Handler, Job, refusal
from rejoinder.worker.inputs import LOCATION, PARSE_IN_THREAD_BYTES, Lines
from rejoinder.worker.line_reading import split, steadily
from rejoinder.worker.pace import Waits
from rejoinder.worker.retry import RetryPolicy
from rejoinder.worker.slots import Slots
from rejoinder.worker.window import Entry, Window

# Lines, as values, and results of one job in memory.
WINDOW_BYTES = 16 * 1024 * 1024
# Of one job begun, or done and not yet written, for each slot: while one line takes long, so many others go on.
WINDOW_LINES_PER_SLOT = 16

# Bytes that a value takes for each of these in its text: the object for what a bracket begins, its place in that for
# what a comma ends, a place in a table and a key for what stands before a colon, and what a string has beside its text.
_TAKEN = ((b"[", 96), (b"{", 96), (b",", 40), (b":", 80), (b'"', 12))


@dataclass(frozen=True, slots=True)
class Means:
    """What lines are run with."""

    handler: Handler
    slots: Slots
    policy: RetryPolicy
    """When a line is tried again. It is tried in its place, and its last error stands there."""
    waits: Waits
    """Told of each line that the engine runs."""
    max_line_bytes: int
    """A longer line is answered 413."""


@dataclass(slots=True, eq=False)
class _Line:
    number: int
    body: Any
    entry: Entry
    slot: bool = True
    """Whether it has one."""


class LineRun:
    """Runs the lines of one job.

    Args:
        means: With what.
        job: Whose lines.
        lines: Where they are.
        latest: The loop's time by which they must have ended.
    """

    def __init__(self, means: Means, job: Job, lines: Lines, latest: float) -> None:
        self._means = means
        self._job = job
        self._source = lines.source
        self._latest = latest
        self._window = Window(WINDOW_LINES_PER_SLOT * max(1, means.slots.capacity), WINDOW_BYTES)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._clock = asyncio.get_running_loop().time
        self._began = self._clock()
        self.lines = 0
        """Read so far."""
        self.failed = 0
        """Of them, those whose result is an error."""

    async def results(self) -> AsyncGenerator[bytes]:
        """The output, in pieces. Closing it stops everything.

        Raises:
            RequestError: the input cannot be read, or has no lines.
            EngineGone: the engine will not come back.
        """
        feeding = asyncio.create_task(self._feed())
        self._tasks.add(feeding)
        feeding.add_done_callback(self._fed)
        try:
            async with aclosing(self._window.pieces()) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(list(self._tasks))

    async def _feed(self) -> None:
        """Start each line when there is room and a slot for it."""
        chunks = steadily(self._source, self._means.policy)
        async with aclosing(chunks), aclosing(split(chunks, self._means.max_line_bytes)) as lines:
            async for line in lines:
                self.lines += 1
                entry = await self._window.enter(weight(line or b""))
                try:
                    body = await self._read(line)
                except RequestError as exc:
                    self._window.finish(entry, self._written(refusal(exc, None, "")))
                else:
                    await self._means.slots.acquire()
                    self._start(_Line(self.lines, body, entry))
        if not self.lines:
            raise BadRequest(f"the input {self._source.location} has no lines", param=LOCATION)

    def _fed(self, feeding: asyncio.Task[None]) -> None:
        self._tasks.discard(feeding)
        self._window.end(_failure(feeding))

    async def _read(self, line: bytes | None) -> Any:
        limit = self._means.max_line_bytes
        if line is None:
            raise RequestTooLarge(f"line {self.lines} has more than {limit} bytes, which are allowed", param=LOCATION)
        try:
            return read_value(line) if len(line) <= PARSE_IN_THREAD_BYTES else await asyncio.to_thread(read_value, line)
        except WireError as exc:
            raise BadRequest(f"line {self.lines} {exc}", param=LOCATION) from exc

    def _start(self, line: _Line) -> None:
        self._means.waits.started(self._clock(), self._began)
        task = asyncio.create_task(self._run(line))
        self._tasks.add(task)
        # Not in the task itself: one that is cancelled before its first step never runs a line.
        task.add_done_callback(partial(self._ended, line))

    def _ended(self, line: _Line, task: asyncio.Task[bytes]) -> None:
        self._tasks.discard(task)
        self._give_back(line)
        if (failure := _failure(task)) is None:
            self._window.finish(line.entry, task.result())
        else:
            self._window.end(failure)

    def _give_back(self, line: _Line) -> None:
        if line.slot:
            line.slot = False
            self._means.slots.release()
            self._means.waits.ended(self._clock())

    async def _run(self, line: _Line) -> bytes:
        """Run a line to its result: an error that another attempt may cure is the result only after the last one."""
        job, policy, attempt = self._job, self._means.policy, 1
        name = f"{job.response_id}-{line.number}"
        while True:
            one = Job(job.path, line.body, name, job.created, attempt, job.metadata, job.options)
            answer = await self._means.handler.run(one, self._latest)
            if not answer.retryable or attempt >= policy.max_attempts:
                return self._written(answer)
            self._give_back(line)
            await asyncio.sleep(policy.delay_of(answer.error, attempt))
            attempt += 1
            await self._means.slots.acquire()
            line.slot = True
            self._means.waits.started(self._clock(), self._clock())

    def _written(self, answer: Answer) -> bytes:
        status_code = answer.status_code
        try:
            body = write_json(answer.body)
        except (ValueError, TypeError) as exc:  # an engine's result that is no JSON, such as NaN
            detail = ErrorDetail(message=f"the result cannot be written as JSON: {exc}", type="engine_error")
            status_code, body = 500, write_json(ErrorBody.of(detail))
        self.failed += status_code >= 400
        return f'{{"status_code":{status_code},"body":{body}}}\n'.encode()


def weight(line: bytes) -> int:
    """About what a line takes of the memory when it was read, at least: short values take many times their text."""
    text = len(line) if line.isascii() and b"\\u" not in line else 4 * len(line)
    return text + sum(size * line.count(mark) for mark, size in _TAKEN)


def _failure(task: asyncio.Task[Any]) -> BaseException | None:
    """What ended a task in place of a result. A job whose line was cancelled from elsewhere is cancelled with it."""
    return asyncio.CancelledError() if task.cancelled() else task.exception()
