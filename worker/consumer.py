"""Receives, runs and sees messages through to their settlement: one task for each.

A message's way: received -> lease held -> its turn -> accepted -> slot -> run -> published -> settled. Its lease is
renewed from the first step to the last. Bad requests skip slot and run; only where order is kept is there a turn to
wait for.
"""

import asyncio
import math
from collections.abc import Coroutine, Sequence
from typing import Any

import structlog

from rejoinder.adapters import AdapterError, Message, Subscription
from rejoinder.worker.accepting import Acceptor, never_stops
from rejoinder.worker.cancels import Cancels
from rejoinder.worker.errors import EngineGone
from rejoinder.worker.handler import Answer, Handler
from rejoinder.worker.held import Counts, Held, Stage
from rejoinder.worker.lease import LeaseKeeper
from rejoinder.worker.logs import places
from rejoinder.worker.notices import Notices
from rejoinder.worker.ordering import Turns
from rejoinder.worker.outputs import Outputs
from rejoinder.worker.receiver import Receiver
from rejoinder.worker.reply import Replier
from rejoinder.worker.retry import RetryPolicy
from rejoinder.worker.running import Runner
from rejoinder.worker.settlement import Settlement
from rejoinder.worker.slots import Slots
from rejoinder.worker.streaming import Streams

log = structlog.get_logger(__name__)

# How often capacity that nobody announces is looked at: an engine that comes back, a prefetch that should grow.
TICK = 0.1
# Answers being published or acked hold no slot; this many, and receiving pauses until the response broker catches up.
MAX_SETTLING = 4096
# Requests held, in bytes of their bodies: what a worker's memory bears, however many slots the engine has.
MAX_HELD_BYTES = 256 * 1024 * 1024
# Requests that wait for the turn of their ordering key take no room from others, up to so many: behind a key with more
# than that at the front of the queue, the rest waits.
MAX_BLOCKED = 1000
# Of the time for which the broker lets a message be held; what is left is for answering it.
HOLD_SHARE = 0.97
# After the grace, answers under way are seen through for this long; also what telling the broker may take then.
LAST_SECONDS = 3.0


class Consumer:
    """Works through one subscription on one engine.

    Args:
        subscription: Where messages come from.
        handler: Runs requests.
        acceptor: Turns a message into what it asks for.
        replier: Makes answers durable.
        slots: The engine's capacity.
        policy: When failed requests come back.
        prefetch: Messages held beyond the slots; None: as many as complete during one receive.
        max_hold: Seconds from receipt after which a message is answered 504; sooner where the broker does not allow
            as much.
        streams: Publishes what comes before a stream's answer.
        outputs: Stores answers; None: there is no store.
        notices: Tells of answers; None: to nobody.
        cancels: Ends what its sender has marked; None: nobody can.
    """

    def __init__(
        self,
        subscription: Subscription,
        handler: Handler,
        acceptor: Acceptor,
        replier: Replier,
        slots: Slots,
        *,
        policy: RetryPolicy,
        prefetch: int | None,
        max_hold: float,
        streams: Streams,
        outputs: Outputs | None = None,
        notices: Notices | None = None,
        cancels: Cancels | None = None,
    ) -> None:
        self._subscription = subscription
        self._slots = slots
        self._prefetch = prefetch
        self._max_hold = min(max_hold, HOLD_SHARE * subscription.max_hold_seconds)
        stops = never_stops if cancels is None else cancels.stop
        self._runner = Runner(
            handler, acceptor, slots, policy, outputs=outputs, streams=streams, max_hold=self._max_hold, stops=stops
        )
        # What waits for its answer to be published is held longer than what waits to be run: a third more.
        self._keeper = LeaseKeeper(subscription, max_hold * 4 / 3)
        self._held: dict[Held, None] = {}  # in the order of receipt
        self._emptied = asyncio.Event()
        self._turns = Turns(subscription.keeps_order)
        self._settling = 0
        self._held_bytes = 0
        self._stopping = False
        self._receiver = Receiver(subscription, self._room, self._take, self._runner.pace)
        # Kept, here and below: until Python 3.12, looking the running loop up is a call of the system each time.
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        self._fatal: BaseException | None = None
        self._handing_back: set[asyncio.Task[None]] = set()
        self.counts = Counts()
        self._settlement = Settlement(
            subscription,
            replier,
            self._keeper,
            policy,
            counts=self.counts,
            turns=self._turns,
            done=self._forget,
            failed=self._not_settled,
            notices=notices,
            cancels=cancels,
        )

    @property
    def engine_waited_seconds(self) -> float:
        """Time in which the engine had no request although one was waiting, here or at the broker."""
        return self._runner.waits.seconds

    # ------------------------------------------------------------------ receiving

    async def run(self) -> None:
        """Work until `drain` is called.

        Raises:
            AdapterError: a broker refuses for good (permission, queue gone).
            EngineGone: the engine will not come back.
        """
        # These outlive this method: what is held is renewed until it is settled or handed back.
        self._chores = [asyncio.create_task(self._keeper.run()), asyncio.create_task(self._tick())]
        for chore in self._chores:
            chore.add_done_callback(self._on_chore_done)
        try:
            await self._receiver.run()
        finally:
            self._stopping = True
            await self._end(self._receiver.late)
        if self._fatal is not None:
            raise self._fatal

    async def _end(self, late: Sequence[Message]) -> None:
        """Let go what came with the stop; what would wait for others of its key waits, to follow them in order."""
        self.counts.received += len(late)
        now = asyncio.get_running_loop().time()
        going = [message for message in late if not (self._turns.busy(message) and self._begun(message, now))]
        await self._not_begun(going, LAST_SECONDS)

    async def _tick(self) -> None:
        """Notice capacity that nobody announced."""
        while True:
            await asyncio.sleep(TICK)
            self._slots.wake()
            self._receiver.wake()

    def _on_chore_done(self, chore: asyncio.Task[None]) -> None:
        if not chore.cancelled() and (exc := chore.exception()) is not None:
            self._fail(exc)  # without renewals, or without slots, going on would lose every lease

    def _take(self, messages: Sequence[Message], asked: float) -> None:
        """Start what a receive brought; `asked` is when it was asked for."""
        self.counts.received += len(messages)
        closed = [message for message in messages if not self._begun(message, asked)]
        if closed:
            self._in_background(self._not_begun(closed))

    def _begun(self, message: Message, asked: float) -> bool:
        """Begin a message unless one of its key is to come before."""
        if self._turns.closed_until(message) is not None:
            return False
        self._begin(message, asked)
        return True

    async def _not_begun(self, messages: Sequence[Message], limit: float | None = None) -> None:
        """Let go what was received and not begun: at once, or when one of its key that was let go has come back."""
        now = asyncio.get_running_loop().time()
        delays: dict[float, list[Message]] = {}
        for message in messages:
            delays.setdefault(self._turns.closed_until(message) or now, []).append(message)
        self.counts.handed_back += len(messages)
        for until, some in delays.items():
            delay = min(until - now, self._subscription.max_lease_seconds)
            await self._settlement.let_come(some, delay, limit=limit)

    def _in_background(self, handing_back: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(handing_back)
        self._handing_back.add(task)
        task.add_done_callback(self._handing_back.discard)
        return task

    def _room(self) -> int:
        """How many messages may be received now."""
        held_bytes = self._held_bytes + self._runner.held_bytes
        if self._settling >= MAX_SETTLING or held_bytes >= MAX_HELD_BYTES or self._runner.jobs_wait:
            return 0
        capacity = self._slots.capacity
        if capacity < 1:
            return 0  # no engine: what would be received could only wait
        prefetch = self._prefetch
        if prefetch is None:
            burst = min(capacity, math.ceil(self._runner.pace.completed_in_one_receive()))
            steady = math.ceil(self._runner.pace.steadily_in_one_receive(self._clock()))
            prefetch = max(1, burst, steady)
        busy = len(self._held) - self._settling - min(self._turns.blocked, MAX_BLOCKED)
        return capacity + prefetch - busy

    # ------------------------------------------------------------------ one message

    def _begin(self, message: Message, asked: float) -> None:
        """Start one message's task; `asked` is when it was asked for, before which its lease cannot have begun."""
        held = Held(message, self._clock())
        held.lease = self._keeper.hold(message, asked, lambda: self._lost(held))
        self._held[held] = None
        self._held_bytes += len(message.body)
        self._turns.enter(held)
        held.task = self._loop.create_task(self._process(held))

    def _forget(self, held: Held) -> None:
        if held not in self._held:
            return
        self._keeper.release(held.lease)
        del self._held[held]
        if not self._held:
            self._emptied.set()
        self._settling -= held.stage is Stage.SETTLING
        self._held_bytes -= len(held.message.body)
        if held.share is not None:
            held.share.free()
        if behind := self._turns.cut(held):
            # It ended without being settled, as by a lost lease: those behind it must not overtake it.
            for one in behind:
                one.abandon()
            self._in_background(self._hand_back(behind))
        self._receiver.wake()

    async def _process(self, held: Held) -> None:
        held.begun = True
        try:
            if held.abandoned:  # before it could be cancelled
                return
            if held.turn is not None:
                await held.turn
                if self._stopping:  # it was left waiting, because nobody may run it before the one ahead is settled
                    await self._hand_back([held])
                    return
            answer = await self._runner.answer(held)
            if self._runner.keeps(held, answer) and not self._settlement.comes_back(held, answer):
                if not await self._ours(held):  # the next delivery may have stored another answer
                    self._lost(held)
                    return
                answer = await self._kept(held, answer)
            if held.abandoned:
                return
            held.stage = Stage.SETTLING
            self._settling += 1
            self._receiver.wake()
            if await self._ours(held):
                held.settling = True
                self._settlement.settle(held, answer)
            else:
                self._lost(held)
        except Exception as exc:  # noqa: BLE001 - a message whose task ended unseen would be held by nobody
            await self._not_settled(held, exc)
        finally:
            if held.stream is not None:
                held.stream.close()
            if not held.settling:
                self._forget(held)

    async def _ours(self, held: Held) -> bool:
        """Whether its lease is."""
        return self._clock() < held.lease.ends or await self._keeper.confirm(held.lease)

    async def _not_settled(self, held: Held, exc: Exception) -> None:
        self._fail(exc)
        await self._hand_back([held])

    async def _kept(self, held: Held, answer: Answer) -> Answer:
        """End a stream, store what is to be stored. It holds no slot; a lost lease or the end of the grace ends it."""
        held.stage = Stage.RUNNING
        self._settling += 1
        self._receiver.wake()
        try:
            return await self._runner.kept(held, answer)
        finally:
            self._settling -= 1

    def _lost(self, held: Held) -> None:
        """The lease has passed to another worker: stop the work and say nothing, for that worker will."""
        if held.answered:
            return  # a renewal met the ack; had the ack failed, its own outcome says so
        self.counts.lease_lost += 1
        log.warning("lease_lost", message_id=held.message.id, attempt=held.message.attempt, stage=held.stage.name)
        if held.stage is Stage.SETTLING:
            held.abandoned = True  # an answer that is on its way arrives; one that waits to be sent again does not
        else:
            held.abandon()

    # ------------------------------------------------------------------ stopping

    def _fail(self, exc: BaseException) -> None:
        if self._fatal is None:
            self._fatal = exc
            expected = isinstance(exc, AdapterError | EngineGone)
            error = {"error": str(exc)} if expected else {"where": places(exc)}
            log.error("worker_failed", error_type=type(exc).__name__, **error)
        self.stop_receiving()

    def stop_receiving(self) -> None:
        """Let `run` return. What is held goes on until `drain`."""
        self._stopping = True
        self._receiver.stop()

    async def drain(self, grace: float, hurry: asyncio.Event) -> None:
        """Finish or hand back everything that is held. Receiving has stopped.

        Waiting messages go back at once, before running ones are waited for: another worker can take them now. Those
        that wait for one of their ordering key which has been started follow it: nobody may run them before. What still
        runs after `grace` seconds, or when `hurry` is set, goes back too. Answers under way are seen through for
        a little longer, because an answer that is published but not acked is given twice; but a response broker that
        is away must not keep a stopping worker alive.
        """
        self.stop_receiving()
        deadline = self._clock() + grace
        await self._hand_back(self._unless(Stage.RUNNING, Stage.SETTLING), min(grace, LAST_SECONDS))
        await self._until_done(deadline, hurry)
        await self._hand_back(self._unless(Stage.SETTLING), LAST_SECONDS)
        await self._until_done(self._clock() + LAST_SECONDS, asyncio.Event())
        left = list(self._held)
        if left:
            for held in left:
                self._turns.cut(held)  # all go together: none takes those behind it along when the abort ends it
            # First, so that nothing is published after its message was handed back.
            await self._settlement.abort()
        await self._hand_back(left, LAST_SECONDS)
        if self._handing_back:
            await asyncio.wait(self._handing_back, timeout=LAST_SECONDS)
        for chore in self._chores:
            chore.cancel()
        await asyncio.wait(self._chores)

    def _unless(self, *stages: Stage) -> list[Held]:
        """What is held, but for what is in one of `stages` or waits for one of its ordering key that is."""
        return [held for held in self._held if (self._turns.ahead(held) or held).stage not in stages]

    async def _until_done(self, deadline: float, hurry: asyncio.Event) -> None:
        """Wait until nothing is held, `deadline` has come on the loop's clock, or `hurry` is set."""
        if not self._held:
            return
        self._emptied.clear()
        ends = [asyncio.create_task(event.wait()) for event in (self._emptied, hurry)]
        left = max(0.0, deadline - self._clock())
        await asyncio.wait(ends, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()

    async def _hand_back(self, helds: Sequence[Held], limit: float | None = None) -> None:
        """Let messages go at once and in order, their work stopped first so that no answer follows.

        Those that wait for one of them go along.
        """
        staying = [held for held in helds if not held.leaving]
        going = list(dict.fromkeys(one for held in staying for one in (held, *self._turns.cut(held))))
        others = [held for held in going if held.task is not asyncio.current_task()]
        for held in going:
            held.leaving = True
        for held in others:
            held.abandon()
        self.counts.handed_back += len(going)
        # Who asks may be one of those whose work is stopped by the next who asks: those that go along still go.
        await asyncio.shield(self._in_background(self._go(going, [held.task for held in others], limit)))

    async def _go(self, going: Sequence[Held], ending: Sequence[asyncio.Task[None]], limit: float | None) -> None:
        if ending:
            await asyncio.wait(ending)
        await self._settlement.let_go(going, 0, limit=limit)
        for held in going:
            self._forget(held)  # what was being settled has nobody else to do it
