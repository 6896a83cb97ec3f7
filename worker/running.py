"""From a held message to its answer, and to what is stored of it: accepted, then run under a slot."""

import asyncio
import time
from dataclasses import replace

from rejoinder.worker.accepting import Acceptor, Part, Stops, never_stops
from rejoinder.worker.errors import Cancelled, TimedOut
from rejoinder.worker.handler import Answer, Answered, Handler, Job, exhausted, refusal
from rejoinder.worker.held import Held, Stage
from rejoinder.worker.inputs import Lines
from rejoinder.worker.line_jobs import LineJobs
from rejoinder.worker.line_run import Means
from rejoinder.worker.outputs import Outputs
from rejoinder.worker.pace import Pace, Waits
from rejoinder.worker.retry import RetryPolicy
from rejoinder.worker.several import all_answers
from rejoinder.worker.slots import Slots
from rejoinder.worker.streaming import Streams, unstreamable


class Runner:
    """Answers messages.

    Args:
        handler: Runs requests.
        acceptor: Turns a message into what it asks for.
        slots: The engine's capacity.
        policy: When failed requests come back.
        outputs: Stores answers; None: there is no store.
        streams: Publishes what comes before a stream's answer.
        max_hold: Seconds from receipt after which a message is answered 504.
        stops: What may end a request before it has an answer.
    """

    def __init__(
        self,
        handler: Handler,
        acceptor: Acceptor,
        slots: Slots,
        policy: RetryPolicy,
        *,
        outputs: Outputs | None,
        streams: Streams,
        max_hold: float,
        stops: Stops = never_stops,
    ) -> None:
        self._handler = handler
        self._acceptor = acceptor
        self._slots = slots
        self._policy = policy
        self._outputs = outputs
        self._streams = streams
        self._max_hold = max_hold
        self._stops = stops
        self._clock = asyncio.get_running_loop().time
        self.pace = Pace()
        self.waits = Waits(self._clock())
        # Without a store for outputs no job of lines is accepted.
        means = Means(handler, slots, policy, self.waits, handler.max_request_bytes)
        self._lines = None if outputs is None else LineJobs(means, outputs.store_stream)

    @property
    def held_bytes(self) -> int:
        """What inputs, results and streams have of the memory."""
        stored = 0 if self._outputs is None else self._outputs.bytes
        return self._acceptor.held_bytes + stored + self._streams.bytes

    @property
    def jobs_wait(self) -> bool:
        """Whether a job of lines waits for others to end: further ones would only wait too."""
        return self._lines is not None and self._lines.waiting > 0

    def keeps(self, held: Held, answer: Answer) -> bool:
        """Whether `kept` may store something of an answer, or end its stream."""
        return (self._outputs is not None and not answer.silent) or held.stream is not None

    async def answer(self, held: Held) -> Answer:
        """Run what a message asks for to its answer; an error is an answer too.

        Raises:
            EngineGone: the engine will not come back; nothing is known of the request.
            AdapterError: a store refuses for good.
        """
        latest = held.received + self._max_hold
        accepted = await self._acceptor.accept(held.message, latest)
        if isinstance(accepted, Job):
            held.job, held.share = accepted, accepted.share
            return await self._run(held, accepted, latest)
        if isinstance(accepted, Answered):
            done = accepted
        else:
            done = await all_answers(accepted, lambda part: self._part(held, part, latest))
        held.job = done.job
        return done.answer

    async def _part(self, held: Held, part: Part, latest: float) -> Answered:
        accepted = await self._acceptor.accept_part(held.message, part, latest)
        if isinstance(accepted, Answered):
            return accepted
        try:
            return Answered(await self._run(held, accepted, latest), accepted)
        finally:
            # Not with the message, as else: another part of it may be waiting for just this room.
            if accepted.share is not None:
                accepted.share.free()

    async def _run(self, held: Held, job: Job, latest: float) -> Answer:
        if job.options.stream:
            held.stream = self._streams.open(held.message, job, held.lease, lambda: not held.abandoned)
        try:
            with self._stops(held.message, job):
                return await self._result(held, job, latest)
        except Cancelled as exc:
            return refusal(exc, job.metadata, job.response_id)

    async def _result(self, held: Held, job: Job, latest: float) -> Answer:
        message = held.message
        if job.options.stream and (problem := unstreamable(job)) is not None:
            return refusal(problem, job.metadata, job.response_id)
        if self._outputs is not None and (known := await self._outputs.recall(message, job)) is not None:
            return known
        if self._policy.exhausted(message.attempt):
            # Earlier deliveries ended with their worker or their lease: running it again could end this one too.
            return exhausted(2 * self._policy.cap, job.metadata, job.response_id)
        if self._lines is not None and isinstance(job.body, Lines):
            return await self._lines.run(job, job.body, latest, held.waits)
        if not self._slots.try_acquire():
            try:
                async with asyncio.timeout_at(latest):
                    await self._slots.acquire()
            except TimeoutError:
                error = TimedOut(f"held for {self._max_hold:g} s without being started")
                return refusal(error, job.metadata, job.response_id)
        stream, now = held.stream, self._clock()
        self.waits.started(now, _since(held, now))
        try:
            held.stage = Stage.RUNNING
            answer = await self._handler.run(job, latest, held.waits, None if stream is None else stream.begin)
        finally:
            if stream is not None:
                stream.end()
            self._slots.release()
            now = self._clock()
            self.waits.ended(now)
        self.pace.completed(now)
        return answer if stream is None else stream.checked(answer)

    async def kept(self, held: Held, answer: Answer) -> Answer:
        """See a stream to its last message, and store what is to be stored of an answer and of those that go with it.

        Raises:
            AdapterError: a store, or the response broker, refuses for good.
        """
        outputs = self._outputs
        if held.stream is not None and answer.kept is None:
            answer = await held.stream.finish(answer)
        if outputs is None:
            return answer
        kept = await outputs.keep(held.message, answer, held.job)
        if not answer.also:
            return kept
        # Stored or refused, each has a name of its own still.
        others: list[Answered] = []
        for one in answer.also:
            other = await outputs.keep(held.message, one.answer, one.job)
            others.append(replace(one, answer=replace(other, named_by_message=True)))
        return replace(kept, named_by_message=True, also=tuple(others))


def _since(held: Held, now: float) -> float:
    """Since when, on the loop's clock, a message could have been received. One that came back: since it was."""
    message = held.message
    if message.sent_at is None or (message.attempt or 1) > 1:
        return held.received
    return min(held.received, now - (time.time() - message.sent_at))
