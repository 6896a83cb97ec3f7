"""Ends a sequence that gets nowhere while the engine runs others."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rejoinder.worker.errors import Unavailable

TICK_SECONDS = 1.0


@dataclass(slots=True)
class _Sequence:
    number: int
    done: asyncio.Future[Any]
    furthest: int = 0  # tokens in the cache, at best: one that is put back and prefilled anew gets nowhere by that
    quiet: float = 0.0  # seconds
    waits_behind: int | None = None  # the newest sequence that had been started when this one began to wait


class StallWatch:
    """Looks once a second, on the event loop, while there are sequences.

    Time counts against a sequence only while the engine makes steps (else it is the engine that hangs), and

    - in the batch: while no more of its tokens are in the cache than were at best. A long prompt on a slow processor
      gets further with each part of it; prefilling again what was put back for want of cache does not count as further.
    - waiting, new or put back: while younger ones are started. Waiting its turn, however long, is no stall.

    Args:
        limit: Seconds.
        position: How many tokens of a sequence are in the cache, by its name; None while it is not in the batch.
        steps: Of the engine so far.
        tick: Seconds between looks.
    """

    def __init__(
        self,
        limit: float,
        position: Callable[[str], int | None],
        steps: Callable[[], int],
        tick: float = TICK_SECONDS,
    ) -> None:
        self._limit = limit
        self._position = position
        self._steps = steps
        self._tick = min(tick, limit / 4)
        self._sequences: dict[str, _Sequence] = {}
        self._added = 0
        self._newest = 0  # of the sequences that have been started
        self._looking = False
        self._before, self._steps_before = 0.0, 0

    def add(self, name: str, done: asyncio.Future[Any]) -> None:
        """Watch a sequence; `done` gets `Unavailable` if it stalls. `remove` it in the end."""
        self._added += 1
        self._sequences[name] = _Sequence(self._added, done, waits_behind=self._added)
        if not self._looking:
            self._wait()

    def remove(self, name: str) -> None:
        """Watch it no more."""
        sequence = self._sequences.pop(name)
        if sequence.done.done() and not sequence.done.cancelled() and sequence.done.exception() is None:
            self._newest = max(self._newest, sequence.number)  # it ran, perhaps between two looks

    def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._looking, self._before, self._steps_before = True, loop.time(), self._steps()
        loop.call_later(self._tick, self._look)

    def _look(self) -> None:
        before, steps = self._before, self._steps_before
        self._looking = False
        if not self._sequences:
            return
        passed = asyncio.get_running_loop().time() - before if self._steps() > steps else 0.0
        positions = {name: self._position(name) for name in self._sequences}
        started = [self._sequences[name].number for name, position in positions.items() if position is not None]
        self._newest = max([self._newest, *started])
        for name, position in positions.items():
            sequence = self._sequences[name]
            if position is None:
                if sequence.waits_behind is None:
                    sequence.waits_behind = self._newest
                stalls = self._newest > sequence.waits_behind
            else:
                sequence.waits_behind = None
                stalls = position <= sequence.furthest
                sequence.furthest = max(sequence.furthest, position)
                sequence.quiet = sequence.quiet if stalls else 0.0
            sequence.quiet += passed if stalls else 0.0
            if sequence.quiet >= self._limit and not sequence.done.done():
                sequence.done.set_exception(
                    Unavailable(
                        f"no progress for {self._limit:g} s while others ran",
                        code="stalled",
                    )
                )
        self._wait()
