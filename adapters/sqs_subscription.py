"""The receiving end of an SQS queue."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from rejoinder.adapters import aws_errors, aws_wire
from rejoinder.adapters.driver import Backlog, Message
from rejoinder.adapters.errors import AdapterError, Denied, LeaseLost, NotFound, Transient

if TYPE_CHECKING:
    from types_aiobotocore_sqs import SQSClient
    from types_aiobotocore_sqs.literals import QueueAttributeNameType

    from rejoinder.adapters.aws import Connections
    from rejoinder.adapters.sqs import Queue

BATCH: Final = 10
"""The most messages that one call of SQS takes or gives."""
POLL_SECONDS: Final = 5
"""How long one call waits for messages. A call under way cannot be recalled: what it brings after a cancellation costs
its messages an attempt, and closing waits for it. Twenty are possible and would save three cheap calls in four."""
PAUSE_SECONDS: Final = 0.25
"""After an empty answer that came before its time, as where too many messages are in flight: no storm of calls."""
CLOSING_SECONDS: Final = POLL_SECONDS + 5.0
MAX_LEASE: Final = 43_200
"""12 h: the longest visibility timeout, and the longest that a message can be held from its receipt."""
HOLD_MARGIN: Final = 60
"""SQS counts the 12 h by its own clock, and refuses a visibility timeout that passes them by a second."""

COUNTS: "Final[list[QueueAttributeNameType]]" = [
    "ApproximateNumberOfMessages",
    "ApproximateNumberOfMessagesNotVisible",
    "ApproximateNumberOfMessagesDelayed",
]

Outcome = AdapterError | None
Item = tuple[int, str, dict[str, int]]
"""A message's place among the messages to settle, its receipt handle, and what else its entry holds."""

_UNTOLD: Final = Transient("the broker's answer does not tell of this message")


@dataclass(frozen=True, slots=True)
class Receipt:
    """The handle of one delivery."""

    handle: str
    at: float
    """Before the call that brought it, on the event loop's clock: no later than SQS counts."""


class SQSSubscription:
    """The receiving end of a queue."""

    max_lease_seconds = float(MAX_LEASE)
    max_hold_seconds = float(MAX_LEASE - HOLD_MARGIN)
    max_receive = BATCH

    def __init__(
        self, queue: "Queue", lease: int, receiving: "Connections[SQSClient]", settling: "Connections[SQSClient]"
    ) -> None:
        self.name = queue.arn
        self.lease_seconds = float(lease)
        self.max_attempts = queue.max_attempts
        self.keeps_order = queue.fifo
        self._queue = queue
        self._lease = lease
        self._receiving = receiving
        self._settling = settling
        self._dead_url: str | None = None
        self._polls: set[asyncio.Task[list[Message]]] = set()
        self._abandoned: set[asyncio.Task[None]] = set()

    async def receive(self, limit: int, wait: float) -> list[Message]:
        """See `rejoinder.adapters.driver.Subscription.receive`. Waits for whole seconds, rounded up."""
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait
        while True:
            asked = loop.time()
            seconds = max(0, math.ceil(min(deadline - asked, POLL_SECONDS)))
            # SQS leases messages to a call whether or not anybody still waits for its answer, so the call is not
            # cancelled: it goes on by itself, and what it brings is let go.
            poll = asyncio.create_task(self._poll(min(limit, BATCH), seconds))
            self._polls.add(poll)
            poll.add_done_callback(self._polls.discard)
            try:
                messages = await asyncio.shield(poll)
            except asyncio.CancelledError:
                letting_go = asyncio.create_task(self._let_go(poll))
                self._abandoned.add(letting_go)
                letting_go.add_done_callback(self._abandoned.discard)
                raise
            now = loop.time()
            if messages or now >= deadline:
                return messages
            if now - asked < seconds / 2:
                await asyncio.sleep(min(PAUSE_SECONDS, deadline - now))

    async def _poll(self, limit: int, seconds: int) -> list[Message]:
        at = asyncio.get_running_loop().time()

        async def poll(sqs: "SQSClient") -> list[Message]:
            answer = await sqs.receive_message(
                QueueUrl=self._queue.url,
                MaxNumberOfMessages=limit,
                WaitTimeSeconds=seconds,
                VisibilityTimeout=self._lease,
                MessageAttributeNames=["All"],
                MessageSystemAttributeNames=cast("Any", aws_wire.SYSTEM_ATTRIBUTES),
            )
            return [aws_wire.decode(raw, Receipt(raw["ReceiptHandle"], at)) for raw in answer.get("Messages", ())]

        return await self._receiving.run("sqs:ReceiveMessage", self._queue.arn, poll, seconds=seconds)

    async def _let_go(self, poll: asyncio.Task[list[Message]]) -> None:
        with suppress(AdapterError):  # nothing was leased that anybody knows of, and nobody is there to be told
            await self.set_lease(await poll, 0)

    async def ack(self, messages: Sequence[Message]) -> list[Outcome]:
        """See `rejoinder.adapters.driver.Subscription.ack`.

        A standard queue may not tell that a lease is lost. A FIFO queue takes no ack after the lease has ended.
        """
        outcomes: list[Outcome] = [None] * len(messages)
        items: list[Item] = [(place, _receipt(message).handle, {}) for place, message in enumerate(messages)]
        await self._settle(messages, items, "sqs:DeleteMessage", "delete_message_batch", outcomes)
        return outcomes

    async def set_lease(self, messages: Sequence[Message], seconds: float) -> list[Outcome]:
        """See `rejoinder.adapters.driver.Subscription.set_lease`. Takes whole seconds, rounded up.

        SQS cannot hide a message again whose lease has ended: renewing it is `LeaseLost` even while nobody has it.
        """
        if not 0 <= seconds <= MAX_LEASE:
            raise ValueError(f"seconds must be from 0 to {MAX_LEASE}, not {seconds}")
        wanted = math.ceil(seconds)
        now = asyncio.get_running_loop().time()
        outcomes: list[Outcome] = [None] * len(messages)
        items: list[Item] = []
        for place, message in enumerate(messages):
            receipt = _receipt(message)
            left = math.floor(receipt.at + self.max_hold_seconds - now)
            if wanted and left <= 0:
                outcomes[place] = LeaseLost(
                    f"message {message.id} was received 12 h ago: SQS lets nobody hold it longer"
                )
            else:
                items.append((place, receipt.handle, {"VisibilityTimeout": min(wanted, left) if wanted else 0}))
        await self._settle(messages, items, "sqs:ChangeMessageVisibility", "change_message_visibility_batch", outcomes)
        return outcomes

    async def _settle(
        self,
        messages: Sequence[Message],
        items: Sequence[Item],
        permission: str,
        operation: Literal["delete_message_batch", "change_message_visibility_batch"],
        outcomes: list[Outcome],
    ) -> None:
        """Send `items` in batches, all at once, and note what failed in `outcomes`."""

        async def batch(chunk: Sequence[Item]) -> None:
            entries: Any = [{"Id": str(place), "ReceiptHandle": handle, **fields} for place, handle, fields in chunk]

            async def call(sqs: "SQSClient") -> dict[str, Outcome]:
                answer = await getattr(sqs, operation)(QueueUrl=self._queue.url, Entries=entries)
                told: dict[str, Outcome] = {one["Id"]: None for one in answer.get("Successful", ())}
                for one in answer.get("Failed", ()):
                    # Letting go what nobody holds has nothing left to do.
                    done = aws_errors.not_in_flight(one) and entries[0].get("VisibilityTimeout") == 0
                    message_id = messages[int(one["Id"])].id
                    told[one["Id"]] = None if done else self._failure(one, message_id, permission)
                return told

            try:
                told = await self._settling.run(permission, self.name, call)
            except AdapterError as exc:
                told = {str(place): exc for place, _, _ in chunk}
            for place, _, _ in chunk:
                outcomes[place] = told.get(str(place), _UNTOLD)

        chunks = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
        if len(chunks) == 1:
            await batch(chunks[0])
        else:
            await asyncio.gather(*map(batch, chunks))

    def _failure(self, failed: object, message_id: str, permission: str) -> AdapterError:
        return aws_errors.lost(failed, message_id) or aws_errors.from_entry(failed, permission, self.name)

    async def backlog(self) -> Backlog:
        """See `rejoinder.adapters.driver.Subscription.backlog`. SQS's counts are approximate."""
        counts, dead = await asyncio.gather(self._counts(self._queue.url, self.name), self._dead())
        waiting, not_visible, delayed = counts
        return Backlog(waiting=waiting, held=not_visible + delayed, dead=dead)

    async def _counts(self, url: str, resource: str) -> tuple[int, int, int]:
        async def count(sqs: "SQSClient") -> tuple[int, int, int]:
            answer = await sqs.get_queue_attributes(QueueUrl=url, AttributeNames=COUNTS)
            found: Mapping[Any, str] = answer.get("Attributes", {})
            waiting, not_visible, delayed = (int(found.get(name, 0)) for name in COUNTS)
            return waiting, not_visible, delayed

        return await self._settling.run("sqs:GetQueueAttributes", resource, count)

    async def _dead(self) -> int | None:
        """Count the dead-letter queue; None where there is none, or these credentials may not look into it."""
        arn = self._queue.dead_letter_arn
        if arn is None:
            return None
        try:
            if self._dead_url is None:
                account, name = arn.split(":")[4:6]
                self._dead_url = await self._settling.run(
                    "sqs:GetQueueUrl", arn, lambda sqs: queue_url(sqs, name, QueueOwnerAWSAccountId=account)
                )
            return sum(await self._counts(self._dead_url, arn))
        except (Denied, NotFound):
            return None

    async def close(self) -> None:
        """Wait for what cancelled receives left behind, so that nothing stays leased for nobody."""
        tasks = self._polls | self._abandoned
        if not tasks:
            return
        try:
            await asyncio.wait(tasks, timeout=CLOSING_SECONDS)
        finally:
            left = [task for task in tasks if not task.done()]
            for task in left:
                task.cancel()
        if left:
            await asyncio.wait(left)


async def queue_url(sqs: "SQSClient", name: str, **owner: str) -> str:
    """Ask for the URL of the queue `name`."""
    return (await sqs.get_queue_url(QueueName=name, **cast("Any", owner)))["QueueUrl"]


def _receipt(message: Message) -> Receipt:
    return cast("Receipt", message.lease)
