"""The end of a message: answered and acked, left to the queue's own policy, or let go to come back.

Only the consumer calls this, and nothing else acks or lets go: what becomes of a message is decided here.
"""

import asyncio
from collections.abc import Callable, Sequence

import structlog

from rejoinder.adapters import AdapterError, Denied, LeaseLost, Message, NotFound, Subscription, TooLarge, Transient
from rejoinder.worker.attempts import Attempts
from rejoinder.worker.batcher import Batcher
from rejoinder.worker.handler import Answer
from rejoinder.worker.held import Counts, Held
from rejoinder.worker.lease import LeaseKeeper
from rejoinder.worker.ordering import Turns
from rejoinder.worker.reply import Replier
from rejoinder.worker.retry import RetryPolicy, bounded, each_until, entry_until

log = structlog.get_logger(__name__)

# An ack that the broker cannot take for this long is given up: the message comes back, and is answered as before.
ACK_LIMIT = 60.0


class Settlement:
    """Settles one subscription's messages.

    Args:
        subscription: Where the messages came from.
        replier: Makes answers durable.
        keeper: Holds the messages' leases.
        policy: When failed requests come back.
        counts: What became of the messages; kept here.
        turns: Whose turn it is, where order is kept.
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
    ) -> None:
        self._subscription = subscription
        self._replier = replier
        self._keeper = keeper
        self._policy = policy
        self._counts = counts
        self._turns = turns
        self._attempts = Attempts()
        self._acks: Batcher[Message, AdapterError | None] = Batcher(self._ack)

    async def settle(self, held: Held, answer: Answer) -> None:
        """Publish the answer and ack the message, or let it come back.

        Where order is kept, only a message that is settled for good gives the next of its key its turn. One that comes
        back takes those behind it along; so does one whose ack fails, though it is answered: it may be delivered again,
        and one that was acked before it would have been overtaken.

        Raises:
            AdapterError: a broker refuses for good; the message is still held.
        """
        message = held.message
        attempt = self._attempts.of(message)
        action = self._policy.on_failure(attempt) if answer.retryable else "answer_and_ack"
        if action == "retry":
            await self._retry_later(held, answer, attempt)
            return
        try:
            await self._replier.publish(message, answer, lambda: not held.abandoned)
        except LeaseLost:
            return  # said already, where the lease was found lost
        except (ValueError, TooLarge) as exc:
            # A fault of ours or of the adapter's, on this response alone: it must not end the worker.
            log.error("response_refused", message_id=message.id, response_id=answer.response_id, error=str(exc))
            await self._retry_later(held, answer, attempt)
            return
        self._attempts.answered(message)
        self._counts.answered += 1
        self._counts.failed += answer.status_code >= 400
        held.answered = True  # and renewed until the ack is through: a slow ack must not bring the message back
        if action == "answer_and_leave":
            await self.let_go([held], 0)
            self._turns.passed(held)
        else:
            await self._acked(held, answer)
        level: Callable[..., None] = log.warning if answer.status_code >= 500 else log.debug
        level(
            "request_answered",
            message_id=message.id,
            response_id=answer.response_id,
            status_code=answer.status_code,
            attempt=attempt,
        )

    async def _acked(self, held: Held, answer: Answer) -> None:
        outcome = await entry_until("ack", lambda: self._acks.submit(held.message), limit=ACK_LIMIT)
        if outcome is None:
            self._turns.passed(held)
            return
        # Answered, yet the message may come back: its answer will carry the same response_id.
        log.warning("ack_failed", message_id=held.message.id, response_id=answer.response_id, error=str(outcome))
        if isinstance(outcome, Denied | NotFound):
            raise outcome  # for good: without acks every message would be answered again and again
        if behind := self._turns.free(held):
            await self._back(held, behind, 0)

    async def _retry_later(self, held: Held, answer: Answer, attempt: int) -> None:
        message = held.message
        delay = min(self._policy.backoff(attempt), self._subscription.max_lease_seconds)
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

    async def _ack(self, messages: Sequence[Message]) -> Sequence[AdapterError | None]:
        try:
            return await bounded(self._subscription.ack(messages))
        except Transient as exc:
            return [exc] * len(messages)

    async def abort(self) -> None:
        """Publish and ack nothing more. What is under way may or may not arrive."""
        await self._replier.abort()
        await self._acks.abort()

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
