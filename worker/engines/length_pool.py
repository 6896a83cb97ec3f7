"""Which of the waiting sequences go into the next forward together. No torch.

A batch is padded to its longest sequence, so sequences of like lengths belong together; and nobody may wait for ever
because others fit better. Each batch is therefore grown around the sequence whose turn it is. Turns are start-time fair
queuing: a request's sequences take their turns one after the other by the tokens before them, from the turn that was
served last when the request came. So a request of thousands does not hold up one of a single sequence.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any

FEW = 32
"""Sequences that are put into their places one by one; more are merged."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """One sequence as the model takes it."""

    ids: list[int]
    """At least one."""
    types: list[int] | None = None
    """Which of two texts each token is of, where the model asks for it."""


@dataclass(eq=False, slots=True)
class Waiting:
    """A sequence in the pool."""

    tokens: Tokens
    owner: Any
    """Whatever its outcome goes to."""
    turn: int
    order: int
    taken: bool = field(default=False)

    @property
    def length(self) -> int:
        """In tokens."""
        return len(self.tokens.ids)


Entry = tuple[int, int, int, Waiting]
"""Length, turn and order, which is unique: tuples of these sort by length without a key."""


class Pool:
    """The sequences that wait for a forward.

    Args:
        budget: Tokens of one batch at most, padding included; a longer sequence goes alone.
        slack: Tokens of padding that one more sequence may cost. Above it, a forward of its own is cheaper.
    """

    def __init__(self, budget: int, slack: int) -> None:
        self._budget = budget
        self._slack = slack
        self._sorted: list[Entry] = []
        self._turns: list[tuple[int, int, Waiting]] = []
        self._orders = count()
        self._now = 0

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, sequences: Sequence[Tokens], owners: Sequence[Any]) -> list[Waiting]:
        """Put a request's sequences in; the owner of each at the same place."""
        turn, added = self._now, []
        for tokens, owner in zip(sequences, owners, strict=True):
            waiting = Waiting(tokens, owner, turn, next(self._orders))
            turn += waiting.length
            heappush(self._turns, (waiting.turn, waiting.order, waiting))
            added.append(waiting)
        entries = sorted((waiting.length, waiting.turn, waiting.order, waiting) for waiting in added)
        if len(entries) < FEW:
            for entry in entries:
                insort(self._sorted, entry)
        else:
            self._sorted += entries
            self._sorted.sort()  # of two sorted runs: little more than a merge
        return added

    def take(self) -> list[Waiting]:
        """The next batch, by length; none where nobody waits. What is taken is no longer in the pool."""
        while self._turns and self._turns[0][2].taken:
            heappop(self._turns)
        if not self._turns:
            return []
        first = self._turns[0][2]
        self._now = max(self._now, first.turn)
        begin = bisect_left(self._sorted, (first.length, first.turn, first.order, first))
        end = begin + 1
        while (grown := self._grown(begin, end)) is not None:
            begin, end = grown
        batch = [entry[3] for entry in self._sorted[begin:end]]
        del self._sorted[begin:end]
        for waiting in batch:
            waiting.taken = True
        return batch

    def _grown(self, begin: int, end: int) -> tuple[int, int] | None:
        """One sequence more, the one that costs the least padding; None where none fits."""
        longest, size = self._sorted[end - 1][0], end - begin
        options: list[tuple[int, int, int]] = []
        if end < len(self._sorted):
            longer = self._sorted[end][0]
            if longer * (size + 1) <= self._budget:
                options.append(((longer - longest) * size, begin, end + 1))
        if begin and longest * (size + 1) <= self._budget:
            options.append((longest - self._sorted[begin - 1][0], begin - 1, end))
        padding, *grown = min(options, default=(self._slack + 1, 0, 0))
        return (grown[0], grown[1]) if padding <= self._slack else None

    def discard(self, sequences: Sequence[Waiting]) -> None:
        """Take out what still waits of these, without running it."""
        if any(not waiting.taken for waiting in sequences):
            for waiting in sequences:
                waiting.taken = True
            self._sorted = [entry for entry in self._sorted if not entry[3].taken]
            self._turns = [turn for turn in self._turns if not turn[2].taken]
            heapify(self._turns)
