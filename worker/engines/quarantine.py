"""Finds the request that kills its engine process, without its neighbours' dying of it again and again.

All that a process ran when it died come back together, and would die together until their attempts are used up. So they
are *suspects*: they run in small groups, and in the end alone, with nothing else in their process. Who dies alone is
guilty; who ends well is forgotten.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from rejoinder.worker.engines.protocol import EngineRequest

REMEMBERED = 10_000
"""Requests remembered; the longest ago are forgotten first."""
SUSPICIOUS_ATTEMPT = 3
"""From this delivery on, other workers' engines may have died of it."""


class Suspects:
    """What a worker knows of the requests that its engine processes died with. Shared by all of them.

    Args:
        limit: Requests remembered.
    """

    def __init__(self, limit: int = REMEMBERED) -> None:
        self._limit = limit
        self._deaths: OrderedDict[str, int] = OrderedDict()
        self._strangers = 0  # ended well since the last death, though delivered as often as a suspect

    def company(self, request: EngineRequest, capacity: int) -> int:
        """The size of the group in which a suspect may run; 0: it is none, and runs with any.

        A group is at most a quarter of the capacity. Attempts are used up by much that is no death, such as workers
        that are scaled down: who is suspected for them alone begins alone, but as such requests end well, groups of
        them grow, until as many as the capacity did and none of them is suspected any more. A death ends that trust.
        """
        known = self._deaths.get(request.response_id, 0) if self._deaths else 0
        often = _often(request)
        if not known and not often:
            return 0
        group = max(1, capacity // 4)
        if known:
            return group if known == 1 and not often else 1
        return min(group, 1 + self._strangers) if self._strangers < capacity else 0

    def died(self, victims: Sequence[EngineRequest]) -> str | None:
        """Remember what a process ran when it died; return the one that is proven to have killed it, by its id."""
        alone = victims[0] if len(victims) == 1 else None
        suspected = alone is not None and (alone.response_id in self._deaths or _often(alone))
        self._strangers = 0
        for name in {one.response_id for one in victims}:
            self._deaths[name] = self._deaths.pop(name, 0) + 1
        while len(self._deaths) > self._limit:
            self._deaths.popitem(last=False)
        return alone.response_id if alone is not None and suspected else None

    def acquit(self, request: EngineRequest) -> None:
        """It ended, well or by its own fault, and its process lived."""
        known = self._deaths.pop(request.response_id, 0) if self._deaths else 0
        if not known and _often(request):
            self._strangers += 1


def _often(request: EngineRequest) -> bool:
    return request.attempt is not None and request.attempt >= SUSPICIOUS_ATTEMPT


class Gate:
    """Lets requests into one process: any number of fresh ones together, or one group of suspects and nothing else.

    While both wait they take turns, so that neither waits for ever: what runs ends, a group of suspects runs, then all
    fresh ones that have come meanwhile, then the next group. Without suspects the gate is a counter.

    Args:
        usable: Whether there is a living process. While there is none nobody is let in; call `turn` when it is there.
    """

    def __init__(self, usable: Callable[[], bool]) -> None:
        self._usable = usable
        self._inside = 0
        self._quarantine = False  # what is inside, or was last, are suspects
        self._fresh: deque[asyncio.Future[None]] = deque()
        self._suspects: deque[tuple[asyncio.Future[None], int]] = deque()

    @property
    def held(self) -> int:
        """Requests inside and waiting."""
        return self._inside + len(self._fresh) + len(self._suspects)

    @property
    def open(self) -> bool:
        """Whether a fresh request would be let in at once."""
        return self._usable() and not self._suspects and not (self._quarantine and self._inside)

    async def enter(self, company: int, waits: Callable[[bool], None] | None) -> None:
        """Return when it is this request's turn; each that returns must be followed by one `leave`.

        Args:
            company: As `Suspects.company` says.
            waits: See `EngineRequest.waits`.

        Raises:
            Exception: what `refuse` was called with, while it waited.
        """
        if not company and self.open:
            self._quarantine = False
            self._inside += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if company:
            self._suspects.append((turn, company))
        else:
            self._fresh.append(turn)
        self.turn()
        if waits is not None and not turn.done():
            waits(True)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.exception() is None:
                self.leave()  # let in just before
            else:
                self._withdraw(turn)
            raise
        except Exception:  # refused: where it goes from here is no longer a matter of others
            if waits is not None:
                waits(False)
            raise
        if waits is not None:
            waits(False)

    def leave(self) -> None:
        """One that was let in is done."""
        self._inside -= 1
        if not self._inside:
            self.turn()

    def turn(self) -> None:
        """Let in whose turn it is."""
        if not self._usable() or (self._inside and (self._quarantine or self._suspects)):
            return
        if self._suspects and not (self._fresh and self._quarantine):
            self._quarantine = True
            largest = self._suspects[0][1]
            while self._suspects and self._inside < (largest := min(largest, self._suspects[0][1])):
                self._let_in(self._suspects.popleft()[0])
        elif self._fresh:
            self._quarantine = False
            while self._fresh:
                self._let_in(self._fresh.popleft())

    def refuse(self, error: Callable[[], Exception]) -> None:
        """Raise an error in all that wait."""
        for turn in [*self._fresh, *(turn for turn, _ in self._suspects)]:
            if not turn.done():
                turn.set_exception(error())
        self._fresh.clear()
        self._suspects.clear()

    def _let_in(self, turn: asyncio.Future[None]) -> None:
        if not turn.done():  # else cancelled a moment ago
            self._inside += 1
            turn.set_result(None)

    def _withdraw(self, turn: asyncio.Future[None]) -> None:
        """One that waited was cancelled: it may have been the suspect for which the fresh ones waited."""
        if turn in self._fresh:
            self._fresh.remove(turn)
        self._suspects = deque(entry for entry in self._suspects if entry[0] is not turn)
        self.turn()
