"""Pulls under way, each of which may outlive the `receive` that started it.

A pull that is cancelled, or whose deadline passes, while its answer is on its way leaves messages leased to nobody. So
when a `receive` ends before its pull, the pull goes on for a moment, and the next `receive` takes it over: an idle
worker that asks every 20 s cancels nothing. What a pull brings that nobody takes over is let go.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence

from rejoinder.adapters.driver import Message

POLL_SECONDS = 100.0
"""The service ends a pull without messages by itself within about 90 s: no answer is on its way when ours ends."""
IMMEDIATE_SECONDS = 20.0
"""For a pull that does not wait. The service still looks for about a second."""
LINGER_SECONDS = 2.0
"""How long a pull goes on without a `receive`. One that nobody is to take over ends when it is as old as this: what
was there for it has come by then."""
SHORT_LINGER_SECONDS = 0.2
"""How long such a pull goes on if it is older: for an answer that is on its way just then."""
EMPTY_SECONDS = 0.1
"""Between a pull that brought nothing and the next: should the service say so at once, it is not stormed."""
LET_GO_SECONDS = 5.0
"""How long closing waits for the broker to take back what nobody received."""

PullOnce = Callable[[int, float, bool], Awaitable[list[Message]]]
LetGo = Callable[[Sequence[Message]], Awaitable[None]]


class Pull:
    """One pull: a task that ends with its messages, or what is left of them."""

    def __init__(self, task: asyncio.Future[list[Message]]) -> None:
        self.task = task
        self.started = asyncio.get_running_loop().time()
        self.arrived = math.inf
        """When its answer came: before that began the leases of what it brought."""
        self.wanted = True
        """Whether what it brings may wait for the next `receive`; else it is let go as soon as it is there."""
        self.timer: asyncio.TimerHandle | None = None


class Pulls:
    """All pulls of one subscription."""

    def __init__(self, pull: PullOnce, let_go: LetGo) -> None:
        self._pull = pull
        self._let_go = let_go
        self.keep_seconds = LINGER_SECONDS
        """How long what a pull has brought is kept for a `receive`, from when it came."""
        self._open: set[Pull] = set()
        """All whose messages nobody has."""
        self._parked: list[Pull] = []
        """Those that no `receive` waits for."""
        self._ending: set[asyncio.Task[None]] = set()

    async def receive(self, limit: int, wait: float) -> list[Message]:
        """Pull up to `limit` messages; an empty list after `wait` seconds. Raises what the pull raises."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait
        immediately = wait <= 0
        while True:
            pull = self._taken_over(immediately) or self._start(limit, immediately)
            patience = IMMEDIATE_SECONDS * 2 if immediately else max(deadline - loop.time(), 0)
            try:
                await asyncio.wait({pull.task}, timeout=patience)
            except asyncio.CancelledError:
                self._park(pull, wanted=False)
                raise
            if not pull.task.done():
                self._park(pull, wanted=True)
                return []
            self._open.discard(pull)
            messages = pull.task.result()
            if len(messages) > limit:
                self._keep(messages[limit:], pull.arrived)
            left = deadline - loop.time()
            if messages or left <= 0:
                return messages[:limit]
            await asyncio.sleep(min(EMPTY_SECONDS, left))

    def _start(self, limit: int, immediately: bool) -> Pull:
        seconds = IMMEDIATE_SECONDS if immediately else POLL_SECONDS
        pull = Pull(asyncio.ensure_future(self._pull(limit, seconds, immediately)))
        # The first callback, so that whoever waits for the pull finds the time. Its task must not know the pull: a
        # circle would keep the channel, and so the socket, of a closed subscription until the collector comes by.
        pull.task.add_done_callback(lambda _: self._arrived(pull))
        self._open.add(pull)
        return pull

    def _arrived(self, pull: Pull) -> None:
        pull.arrived = asyncio.get_running_loop().time()
        self._done(pull)

    def _keep(self, messages: list[Message], arrived: float) -> None:
        """Keep for the next `receive` what this one did not ask for: the pull was begun by one that asked for more."""
        rest = Pull(asyncio.get_running_loop().create_future())
        rest.task.set_result(messages)
        rest.arrived = arrived
        self._open.add(rest)
        self._park(rest, wanted=True)
        self._done(rest)

    def _taken_over(self, immediately: bool) -> Pull | None:
        """Find a pull that nobody waits for, rather one that has ended; a `receive` without a wait takes only such.

        The first to have ended is the first to be taken, for the order of what it brought. What was kept too long, in
        a process that was suspended, say, is not given out.
        """
        latest = asyncio.get_running_loop().time() - self.keep_seconds
        for pull in sorted(self._parked, key=lambda one: (not one.task.done(), one.arrived)):
            if pull.arrived < latest:
                self._end(pull)
            elif pull.task.done() or not immediately:
                self._parked.remove(pull)
                if pull.timer:
                    pull.timer.cancel()
                pull.wanted = True
                return pull
        return None

    def _park(self, pull: Pull, *, wanted: bool) -> None:
        pull.wanted = wanted
        self._parked.append(pull)
        pull.timer = asyncio.get_running_loop().call_later(LINGER_SECONDS if wanted else _rest(pull), self._end, pull)
        if pull.task.done() and not wanted:
            self._end(pull)

    def _done(self, pull: Pull) -> None:
        """Keep what a parked pull has brought for the next `receive`, but not for long: its leases run."""
        if pull in self._parked:
            if not pull.wanted:
                self._end(pull)
            elif pull.timer:
                pull.timer.cancel()
                pull.timer = asyncio.get_running_loop().call_at(pull.arrived + self.keep_seconds, self._end, pull)

    def _end(self, pull: Pull) -> None:
        """Let go of a parked pull, or of what it has brought."""
        if pull not in self._parked:
            return
        self._parked.remove(pull)
        self._open.discard(pull)
        if pull.timer:
            pull.timer.cancel()
        if not pull.task.done():
            pull.task.cancel()
        task = asyncio.ensure_future(self._give_back(pull))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _give_back(self, pull: Pull) -> None:
        await asyncio.wait({pull.task})
        # An error is nobody's any more: the next receive meets its own.
        if not pull.task.cancelled() and pull.task.exception() is None and pull.task.result():
            await self._let_go(pull.task.result())

    async def close(self) -> None:
        """End all pulls; those that have just begun may bring something, which is let go."""
        for pull in list(self._parked):
            pull.wanted = False
            if pull.task.done():
                self._end(pull)
        # Also those whose receive was cancelled a moment ago and has not heard of it: it parks them meanwhile.
        await asyncio.gather(*(asyncio.wait({pull.task}, timeout=_rest(pull)) for pull in self._open))
        for pull in list(self._parked):
            self._end(pull)
        for pull in self._open:
            pull.task.cancel()
        if self._ending:
            await asyncio.wait(set(self._ending), timeout=LET_GO_SECONDS)
        for task in self._ending:
            task.cancel()


def _rest(pull: Pull) -> float:
    """Return for how many seconds more a pull goes on that nobody is going to take over."""
    age = asyncio.get_running_loop().time() - pull.started
    return max(LINGER_SECONDS - age, SHORT_LINGER_SECONDS)
