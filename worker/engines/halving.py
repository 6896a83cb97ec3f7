"""Which sequences may be in the next step after one that failed, and how many tokens. No torch, no I/O."""

from collections.abc import Sequence
from dataclasses import dataclass

GROW_AFTER = 8
"""Steps at a limit before it is doubled: where memory stays short, one step in about ten is tried in vain."""


@dataclass(frozen=True, slots=True)
class Group:
    """What one step may hold while a failed one is done again."""

    names: frozenset[str]
    tokens: int
    """At most."""
    last: bool = False
    """The last try of the one sequence in it."""


class Halving:
    """A failed step's sequences are run again in two halves, and a half that fails in halves of its own.

    It ends by construction: a step that fails is followed by one of at most half its sequences or, where it had only
    one and memory was short, of half its tokens; what cannot be halved is tried once more, since memory may have been
    short for a moment only. So after at most log2(sequences) + log2(tokens) + 3 failures in a row either a step
    succeeds, which brings its sequences forward, or the one sequence that is left is given up.

    A step that was too large for the memory leaves a limit, the largest half that went well, so that not each step
    fails first. The limit doubles after every `GROW_AFTER` steps. One sequence's own failure leaves none, nor does that
    of a step of one token: none is smaller.
    """

    def __init__(self) -> None:
        self._groups: list[Group] = []
        self._limit: int | None = None
        self._steps = 0  # at that limit
        self._largest = 0  # tokens of a half that went well
        self._too_large = False

    @property
    def group(self) -> Group | None:
        """Whose turn it is alone. None: anybody's, within `limit`."""
        return self._groups[-1] if self._groups else None

    @property
    def limited(self) -> bool:
        """Whether steps are kept smaller than they could be."""
        return self._limit is not None

    def limit(self, budget: int) -> int:
        """Tokens of the next step, at most, of a budget that holds anyway."""
        if self._limit is not None and self._limit >= budget:
            self._limit = None
        return budget if self._limit is None else self._limit

    def failed(self, step: Sequence[tuple[str, int]], *, memory: bool) -> str | None:
        """A step failed: sequences by name, with how many tokens each had in it.

        Args:
            step: Not empty.
            memory: It might have fitted with fewer tokens.

        Returns:
            Which sequence cannot run, if that is known now. It is out of every later group.
        """
        last, tokens = False, sum(count for _, count in step)
        if self._groups:
            last = self._groups.pop().last
        else:
            # One token is too large for nothing smaller: if it goes well the next time, memory was short for a moment.
            self._largest, self._too_large = 0, memory and tokens > 1
        if len(step) > 1:
            middle = len(step) // 2
            self._groups += [_group(step[middle:]), _group(step[:middle])]
        elif memory and tokens > 1:
            self._groups.append(Group(frozenset({step[0][0]}), tokens // 2))
        elif not last:
            self._groups.append(Group(frozenset({step[0][0]}), tokens, last=True))
        else:
            self._too_large = False  # found: the step was not too large, it had this one in it
            self._settle()
            return step[0][0]
        return None

    def succeeded(self, tokens: int) -> None:
        """A step of so many tokens went well."""
        if self._groups:
            self._groups.pop()
            self._largest = max(self._largest, tokens)
            self._settle()
        elif self._limit is not None:
            self._steps += 1
            if self._steps >= GROW_AFTER:
                self._limit, self._steps = 2 * self._limit, 0

    def drop(self) -> None:
        """Nobody of the group can run now: they were cancelled, or put back for want of cache."""
        self._groups.pop()
        self._settle()

    def _settle(self) -> None:
        if not self._groups and self._too_large and self._largest:
            self._limit, self._steps = self._largest, 0


def _group(step: Sequence[tuple[str, int]]) -> Group:
    return Group(frozenset(name for name, _ in step), sum(count for _, count in step))
