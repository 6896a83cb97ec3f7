"""The end of a message: answered and acked, left to the queue's own policy, or let go to come back.

Only the consumer calls this, and nothing else acks or lets go: what becomes of a message is decided here.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import structlog

from rejoinder.adapters import (
    AdapterError,
    Denied,
    LeaseLost,
    Message,
    NotFound,
    Outgoing,
    Subscription,
    TooLarge,
    Transient,
)
from rejoinder.worker.attempts import Attempts
from rejoinder.worker.batcher import Batcher, Gatherer
from rejoinder.worker.cancels import Cancels
from rejoinder.worker.handler import Answer, Answered
from rejoinder.worker.held import Counts, Held
from rejoinder.worker.lease import LeaseKeeper
from rejoinder.worker.notices import Notices
from rejoinder.worker.ordering import Turns
from rejoinder.worker.reply import Outcome, Replier
from rejoinder.worker.retry import Action, RetryPolicy, bounded, each_until, entry_until

log = structlog.get_logger(__name__)

# An ack that the broker cannot take for this long is given up: the message comes back, and is answered as before.
ACK_LIMIT = 60.0


class _Settling(NamedTuple):
    """A message whose answer is there."""

    held: Held
    answer: Answer
    attempt: int
    leave: bool
    """The message is left to its queue's dead-letter policy, not acked."""
    outgoing: Outgoing


class Settlement:
    """Settles one subscription's messages: in batches without a task for each, as long as all goes well.

    Args:
        subscription: Where the messages came from.
        replier: Makes answers durable.
        keeper: Holds the messages' leases.
        policy: When failed requests come back.
        counts: What became of the messages; kept here.
        turns: Whose turn it is, where order is kept.
        done: Called once with each message that was given to `settle`, when nothing is left to do for it.
        failed: Called in place of it where a broker refuses for good, or we are at fault: the message is still held.
        notices: Tells of answers; None: to nobody.
        cancels: Whose marks are removed; None: there are none.
    """

    def __init__(
        self,
        subscription: Subscription,
        replier: Replier,
        keeper: LeaseKeeper,
        policy: RetryPolicy,
        *,
        counts: Counts,
        turns: Turns,
        done: Callable[[Held], None],
        failed: Callable[[Held, Exception], Awaitable[None]],
        notices: Notices | None = None,
        cancels: Cancels | None = None,
    ) -> None:
        self._subscription = subscription
        self._replier = replier
        self._keeper = keeper
        self._policy = policy
        self._counts = counts
        self._turns = turns
        self._done = done
        self._failed = failed
        self._notices = notices
        self._cancels = cancels
        self._attempts = Attempts()
        self._answered: Gatherer[_Settling] = Gatherer(self._publish)
        # A stream's last message has an ordering key of its own, and may need a call of its own: see `Streams`.
        self._streamed: Gatherer[_Settling] = Gatherer(self._publish, max_items=replier.max_keys, full=replier.calls)
        self._published: Gatherer[_Settling] = Gatherer(self._ack)
        self._acks_again: Batcher[Message, AdapterError | None] = Batcher(self._ack_all)

    def settle(self, held: Held, answer: Answer) -> None:
        """See to it that the answer is published and the message acked, or that it comes back.

        Where order is kept, only a message that is settled for good gives the next of its key its turn. One that comes
        back takes those behind it along; so does one whose ack fails, though it is answered: it may be delivered again,
        and one that was acked before it would have been overtaken.
        """
        message = held.message
        attempt = self._attempts.of(message)
        action = "answer_and_ack" if answer.error is None and answer.kept is None else self._action(answer, attempt)
        if action == "retry":
            self._in_task(held, self._retry_later, held, answer, attempt)
            return
        if answer.silent:
            held.answered = True
            self._published.put(_Settling(held, answer, attempt, False, Outgoing(b"")))
            return
        outgoing = self._replier.outgoing(message, answer)
        settling = _Settling(held, answer, attempt, action == "answer_and_leave", outgoing)
        if answer.also:
            self._in_task(held, self._publish_again, settling, None)
        else:
            (self._answered if answer.stream is None else self._streamed).put(settling)

    def comes_back(self, held: Held, answer: Answer) -> bool:
        """Whether `settle` will let the message come back in place of giving this answer."""
        return self._action(answer, self._attempts.of(held.message)) == "retry"

    def _action(self, answer: Answer, attempt: int) -> Action:
        action = self._policy.on_failure(attempt)
        if answer.retryable:
            return action
        # One that was left to the queue's policy with such an answer may come once more before the policy takes it.
        again = answer.status_code >= 500 and answer.kept is not None and answer.kept.source != ""
        return action if again and action == "answer_and_leave" else "answer_and_ack"

    def _in_task(self, held: Held, rest: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Give a message that needs more than the usual steps a task of its own for the rest of its way."""
        held.task = asyncio.create_task(self._guarded(held, rest, *args))
        # Not in the task itself: one that is cancelled before its first step never runs a line.
        held.task.add_done_callback(lambda _: self._done(held))

    async def _guarded(self, held: Held, rest: Callable[..., Awaitable[None]], *args: Any) -> None:
        try:
            await rest(*args)
        except Exception as exc:  # noqa: BLE001 - a message whose task ended unseen would be held by nobody
            await self._failed(held, exc)

    async def _publish(self, batch: list[_Settling]) -> None:
        wanted = [one for one in batch if not one.held.abandoned]
        if len(wanted) < len(batch):
            for one in batch:
                if one.held.abandoned:
                    self._done(one.held)
        outcomes: Sequence[Outcome | Exception]
        try:
            outcomes = await self._replier.send([one.outgoing for one in wanted])
        except Exception as exc:  # noqa: BLE001 - it is raised again for each message, in a task of its own
            outcomes = [exc] * len(wanted)
        for one, outcome in zip(wanted, outcomes, strict=True):
            if not isinstance(outcome, str):
                self._in_task(one.held, self._publish_again, one, outcome)
            elif one.leave or self._notices is not None:
                self._in_task(one.held, self._end, one)
            else:
                self._is_answered(one)
                self._published.put(one)

    async def _publish_again(self, one: _Settling, failure: Exception | None) -> None:
        held, answer = one.held, one.answer
        if failure is not None and not isinstance(failure, AdapterError | ValueError):
            raise failure
        try:
            for other in answer.also:
                await self._replier.publish_again(held.message, other.answer, None, lambda: not held.abandoned)
            await self._replier.publish_again(held.message, answer, failure, lambda: not held.abandoned)
        except LeaseLost:
            return  # said already, where the lease was found lost
        except (ValueError, TooLarge) as exc:
            # A fault of ours or of the adapter's, on this response alone: it must not end the worker.
            response_id = answer.response_id
            log.error("response_refused", message_id=held.message.id, response_id=response_id, error=str(exc))
            await self._retry_later(held, answer, one.attempt)
            return
        await self._end(one)

    async def _end(self, one: _Settling) -> None:
        """See a message whose answer is published to its end by itself."""
        self._is_answered(one)
        if self._notices is not None:
            held = one.held
            try:
                for told in (*one.answer.also, Answered(one.answer, held.job)):
                    await self._notices.tell(held.message, told.answer, told.job, lambda: not held.abandoned)
            except LeaseLost:
                return
        if one.leave:
            await self.let_go([one.held], 0)
            self._settled(one)
        else:
            await self._ack_until(one, None)

    def _is_answered(self, one: _Settling) -> None:
        self._attempts.answered(one.held.message)
        self._counts.answered += 1
        self._counts.failed += one.answer.status_code >= 400
        one.held.answered = True  # and renewed until the ack is through: a slow ack must not bring the message back

    async def _ack(self, batch: list[_Settling]) -> None:
        outcomes: Sequence[Exception | None]
        try:
            outcomes = await self._ack_all([one.held.message for one in batch])
        except Exception as exc:  # noqa: BLE001 - it is raised again for each message, in a task of its own
            outcomes = [exc] * len(batch)
        for one, outcome in zip(batch, outcomes, strict=True):
            if outcome is None:
                self._settled(one)
                self._done(one.held)
            else:
                self._in_task(one.held, self._ack_until, one, outcome)

    async def _ack_until(self, one: _Settling, failure: Exception | None) -> None:
        """Ack a message that could not be acked in the usual way, or was not published in the usual way."""
        held, answer = one.held, one.answer
        if failure is not None and not isinstance(failure, AdapterError):
            raise failure
        outcome: AdapterError | None = failure
        if outcome is None or isinstance(outcome, Transient):
            outcome = await entry_until("ack", lambda: self._acks_again.submit(held.message), limit=ACK_LIMIT)
        if outcome is None:
            self._settled(one)
            return
        # Answered, yet the message may come back: its answer will carry the same response_id.
        log.warning("ack_failed", message_id=held.message.id, response_id=answer.response_id, error=str(outcome))
        if isinstance(outcome, Denied | NotFound):
            raise outcome  # for good: without acks every message would be answered again and again
        if behind := self._turns.free(held):
            await self._back(held, behind, 0)
        self._tell(one)

    def _settled(self, one: _Settling) -> None:
        """It is settled for good."""
        self._turns.passed(one.held)
        if self._cancels is not None:
            self._cancels.settled(one.held.message, one.answer, one.held.job)
        self._tell(one)

    def _tell(self, one: _Settling) -> None:
        level: Callable[..., None] = log.warning if one.answer.status_code >= 500 else log.debug
        level(
            "request_answered",
            message_id=one.held.message.id,
            response_id=one.answer.response_id,
            status_code=one.answer.status_code,
            attempt=one.attempt,
        )

    async def _retry_later(self, held: Held, answer: Answer, attempt: int) -> None:
        message = held.message
        delay = min(self._policy.delay_of(answer.error, attempt), self._subscription.max_lease_seconds)
        self._attempts.failed(message)
        await self._back(held, self._turns.free(held), delay)
        self._counts.retried += 1
        log.warning(
            "request_retried",
            message_id=message.id,
            response_id=answer.response_id,
            status_code=answer.status_code,
            attempt=attempt,
            delay=round(delay, 2),
        )

    async def _back(self, held: Held, behind: Sequence[Held], delay: float) -> None:
        """Let a message come back in `delay` seconds, and those behind it that waited for their turn."""
        # In one call and with one delay, so that none of those behind can be received before this one.
        await self.let_go([held, *self._freed(behind)], delay)
        self._turns.close(held, delay)
        if late := self._freed(self._turns.cut(held)):  # received meanwhile: kept its place until now for their sake
            await self.let_go(late, delay)

    def _freed(self, behind: Sequence[Held]) -> Sequence[Held]:
        """Stop those that waited for their turn in vain."""
        for one in behind:
            one.abandon()
        self._counts.handed_back += len(behind)
        return behind

    async def _ack_all(self, messages: Sequence[Message]) -> Sequence[AdapterError | None]:
        try:
            return await bounded(self._subscription.ack(messages))
        except Transient as exc:
            return [exc] * len(messages)

    async def abort(self) -> None:
        """Publish and ack nothing more. What is under way may or may not arrive."""
        await self._answered.abort()
        await self._streamed.abort()
        await self._published.abort()
        await self._replier.abort()
        await self._acks_again.abort()
        if self._notices is not None:
            await self._notices.abort()

    async def let_go(self, helds: Sequence[Held], seconds: float, *, limit: float | None = None) -> None:
        """Renew messages no more and let them come back in `seconds`. See `let_come`."""
        leases = [held.lease for held in helds]
        for lease in leases:
            self._keeper.release(lease)
        await self._keeper.quiet(leases, limit)
        await self.let_come([held.message for held in helds], seconds, limit=limit)

    async def let_come(self, messages: Sequence[Message], seconds: float, *, limit: float | None = None) -> None:
        """Make messages available again in `seconds`. If the broker cannot be told, their leases run out instead.

        Args:
            messages: Whose leases nobody renews, in the order of their receipt.
            seconds: From now; 0: at once.
            limit: Seconds to try for. Default: as long as a lease lasts, for then it has run out.
        """

        async def call(items: Sequence[Message]) -> list[AdapterError | None]:
            return await self._subscription.set_lease(items, seconds)

        if not messages:
            return
        limit = self._subscription.lease_seconds if limit is None else limit
        try:
            async with asyncio.timeout(limit + 1.0):  # a call that never answers counts too
                outcomes = await each_until("set_lease", call, messages, limit=limit)
        except (AdapterError, TimeoutError) as exc:
            outcomes = [Transient(str(exc) or "the broker did not answer")] * len(messages)
        for message, outcome in zip(messages, outcomes, strict=True):
            if outcome is not None and not isinstance(outcome, LeaseLost):
                log.warning("let_go_failed", message_id=message.id, error=str(outcome))
