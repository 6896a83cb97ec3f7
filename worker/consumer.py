"""Receives, runs and sees messages through to their settlement: one task for each.

A message's way: received -> lease held -> accepted -> slot -> run -> published -> settled. Its lease is renewed from
the first step to the last. Bad requests skip slot and run.
"""

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import structlog

from rejoinder.adapters import AdapterError, Message, Subscription
from rejoinder.worker.errors import EngineGone, TimedOut
from rejoinder.worker.handler import Answer, Handler, Job, exhausted, refusal
from rejoinder.worker.held import Counts, Held, Stage
from rejoinder.worker.lease import LeaseKeeper
from rejoinder.worker.pace import Pace
from rejoinder.worker.reply import Replier
from rejoinder.worker.retry import RetryPolicy, call_until
from rejoinder.worker.settlement import ACK_LIMIT, Settlement
from rejoinder.worker.slots import Slots

log = structlog.get_logger(__name__)

# The longest poll: it bounds only how often an idle worker asks, since a message or a stop ends it at once.
RECEIVE_WAIT = 20.0
# How often capacity that nobody announces is looked at: an engine that comes back, a prefetch that should grow.
TICK = 0.1
# Answers being published or acked hold no slot; this many, and receiving pauses until the response broker catches up.
MAX_SETTLING = 4096


class Consumer:
    """Works through one subscription on one engine.

    Args:
        subscription: Where messages come from.
        handler: Turns a message into an answer.
        replier: Makes answers durable.
        slots: The engine's capacity.
        policy: When failed requests come back.
        prefetch: Messages held beyond the slots; None: as many as complete during one receive.
        max_hold: Seconds from receipt after which a message is answered 504.
    """

    def __init__(
        self,
        subscription: Subscription,
        handler: Handler,
        replier: Replier,
        slots: Slots,
        *,
        policy: RetryPolicy,
        prefetch: int | None,
        max_hold: float,
    ) -> None:
        self._subscription = subscription
        self._handler = handler
        self._slots = slots
        self._policy = policy
        self._prefetch = prefetch
        self._max_hold = max_hold
        self._keeper = LeaseKeeper(subscription)
        self._held: set[Held] = set()
        self._settling = 0
        self._room_made = asyncio.Event()
        self._stopping = asyncio.Event()
        self._pace = Pace()
        self._fatal: Exception | None = None
        self.counts = Counts()
        self._settlement = Settlement(subscription, replier, self._keeper, policy, self.counts)

    # ------------------------------------------------------------------ receiving

    async def run(self) -> None:
        """Work until `drain` is called.

        Raises:
            AdapterError: a broker refuses for good (permission, queue gone).
            EngineGone: the engine will not come back.
        """
        stopping = asyncio.create_task(self._stopping.wait())
        # The keeper outlives this method: what is held is renewed until it is settled or handed back.
        self._keeping = asyncio.create_task(self._keeper.run())
        try:
            while not self._stopping.is_set():
                room = self._room()
                if room < 1:
                    await self._wait_for_room()
                    continue
                await self._receive(room, stopping)
        finally:
            stopping.cancel()
        if self._fatal is not None:
            raise self._fatal

    async def _receive(self, room: int, stopping: asyncio.Task[bool]) -> None:
        started = asyncio.get_running_loop().time()
        receiving = asyncio.create_task(call_until("receive", lambda: self._subscription.receive(room, RECEIVE_WAIT)))
        await asyncio.wait({receiving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not receiving.done():
            receiving.cancel()
            await asyncio.wait({receiving})
            if receiving.cancelled():
                return
        messages = receiving.result()
        if self._stopping.is_set():  # they came with the signal: nothing starts any more
            self.counts.handed_back += len(messages)
            await self._settlement.let_go(messages, 0)
            return
        if len(messages) == room:
            # Only a receive that was filled tells the round trip: any other may have waited for messages to come.
            self._pace.received(asyncio.get_running_loop().time() - started)
        self.counts.received += len(messages)
        for message in messages:
            self._begin(message, started)

    def _room(self) -> int:
        """How many messages may be received now."""
        if self._settling >= MAX_SETTLING:
            return 0
        capacity = self._slots.capacity
        if capacity < 1:
            return 0  # no engine: what would be received could only wait
        prefetch = self._prefetch
        if prefetch is None:
            prefetch = max(1, min(capacity, math.ceil(self._pace.completed_in_one_receive())))
        return capacity + prefetch - (len(self._held) - self._settling)

    async def _wait_for_room(self) -> None:
        self._room_made.clear()
        try:
            await asyncio.wait_for(self._room_made.wait(), TICK)
        except TimeoutError:
            self._slots.wake()

    # ------------------------------------------------------------------ one message

    def _begin(self, message: Message, received: float) -> None:
        held = Held(message, received)
        held.lease = self._keeper.hold(message, received, lambda: self._lost(held))
        self._held.add(held)
        held.task = asyncio.create_task(self._process(held))
        # Not in the task itself: one that is cancelled before its first step never runs a line.
        held.task.add_done_callback(lambda _: self._forget(held))

    def _forget(self, held: Held) -> None:
        self._keeper.release(held.lease)
        self._held.discard(held)
        self._room_made.set()

    async def _process(self, held: Held) -> None:
        try:
            answer = await self._answer(held)
            if held.abandoned:
                return
            held.stage = Stage.SETTLING
            self._settling += 1
            self._room_made.set()
            try:
                if await self._keeper.confirm(held.lease):
                    await self._settlement.settle(held, answer)
                else:
                    self._lost(held)
            finally:
                self._settling -= 1
        except (AdapterError, EngineGone) as exc:
            self._fail(exc)
            await self._hand_back([held])

    async def _answer(self, held: Held) -> Answer:
        message = held.message
        job = await self._handler.accept(message)
        if isinstance(job, Answer):
            return job
        if self._policy.exhausted(message.attempt):
            # Earlier deliveries ended with their worker or their lease: running it again could end this one too.
            return exhausted(self._policy.cap, job.metadata, job.engine_request.response_id)
        try:
            async with asyncio.timeout_at(held.received + self._max_hold):
                return await self._run(held, job)
        except TimeoutError:
            error = TimedOut(f"held for {self._max_hold:g} s without a result")
            return refusal(error, job.metadata, job.engine_request.response_id)

    async def _run(self, held: Held, job: Job) -> Answer:
        async with self._slots:
            held.stage = Stage.RUNNING
            answer = await self._handler.run(job)
        self._pace.completed(asyncio.get_running_loop().time())
        return answer

    def _lost(self, held: Held) -> None:
        """The lease has passed to another worker: stop the work and say nothing, for that worker will."""
        self.counts.lease_lost += 1
        log.warning("lease_lost", message_id=held.message.id, attempt=held.message.attempt, stage=held.stage.name)
        if held.stage is not Stage.SETTLING:
            held.abandon()

    # ------------------------------------------------------------------ stopping

    def _fail(self, exc: Exception) -> None:
        if self._fatal is None:
            self._fatal = exc
            log.error("worker_failed", error=str(exc), error_type=type(exc).__name__)
        self.stop_receiving()

    def stop_receiving(self) -> None:
        """Let `run` return. What is held goes on until `drain`."""
        self._stopping.set()
        self._room_made.set()

    async def drain(self, grace: float, hurry: asyncio.Event) -> None:
        """Finish or hand back everything that is held. Receiving has stopped.

        Waiting messages go back at once, before running ones are waited for: another worker can take them now. What
        still runs after `grace` seconds, or when `hurry` is set, goes back too. Answers under way are seen through:
        an answer published but not acked would be given twice.
        """
        self.stop_receiving()
        await self._hand_back([held for held in self._held if held.stage is Stage.WAITING])
        running = [held.task for held in self._held]
        if running:
            hurrying = asyncio.create_task(hurry.wait())
            finished = asyncio.gather(*running, return_exceptions=True)
            ends: set[asyncio.Future[Any]] = {finished, hurrying}
            await asyncio.wait(ends, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
            hurrying.cancel()
            await self._hand_back([held for held in self._held if held.stage is not Stage.SETTLING])
            settling = [held.task for held in self._held]
            if settling:
                # Bounded: a response broker that is away must not keep a stopping worker alive; the leases run out.
                await asyncio.wait(settling, timeout=max(grace, ACK_LIMIT / 6))
        await self._hand_back(list(self._held))
        self._keeping.cancel()
        await asyncio.wait({self._keeping})

    async def _hand_back(self, helds: Sequence[Held]) -> None:
        """Let messages go at once, their work stopped first so that no answer follows."""
        others = [held for held in helds if held.task is not asyncio.current_task()]
        for held in others:
            held.abandon()
        if others:
            await asyncio.wait([held.task for held in others])
        for held in helds:
            self._keeper.release(held.lease)
        if helds:
            self.counts.handed_back += len(helds)
            await self._settlement.let_go([held.message for held in helds], 0)
