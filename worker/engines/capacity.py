"""How many sequences a KV cache has room for, judged by those seen lately. Arithmetic only: no model, no torch."""

from dataclasses import dataclass

NEWEST = 0.02
"""Weight of the newest observation: about the last hundred decide. More, and the capacity would follow every answer."""


class Average:
    """A moving average.

    Args:
        assumed: Taken as the first observation.
    """

    def __init__(self, assumed: float) -> None:
        self.value = assumed
        self._seen = 1

    def add(self, value: float) -> None:
        """Take note of one observation."""
        self._seen += 1
        self.value += max(1.0 / self._seen, NEWEST) * (value - self.value)


@dataclass(frozen=True, slots=True)
class CacheUse:
    """A KV cache at one moment. Sizes are in any one unit, say bytes."""

    free: float
    """With what is kept only in case that a later sequence can use it."""
    margin: float
    """Of the free part, what is left to those that are in it to grow: new ones are let in only where there is more."""
    held: float
    """By sequences; what several of them share counts for each."""
    sequences: int
    """Those that hold any of it."""


class CacheCapacity:
    """How many sequences are in a full cache at once.

    A sequence grows while it runs, and a long one runs for longer than a short one: what counts is the size of those
    that are found in the cache at any moment, not of those that come.

    Args:
        size: Of a sequence halfway through its answer, before any has been seen.
        steps: That it runs for.
    """

    def __init__(self, size: float, steps: float) -> None:
        self._held = Average(size * steps)
        self._steps = Average(steps)

    def saw(self, size: float, steps: int) -> None:
        """A sequence has run so many steps; halfway through them it had this size."""
        self._held.add(size * steps)
        self._steps.add(steps)

    def fits(self, use: CacheUse) -> int:
        """Sequences at once: those that hold some of the cache now, and those that it has room for; at least 1.

        Those that have just begun will grow, so the room is reckoned for all together; what they share is room for
        more. Where those that are in it are larger than usual, only what they leave counts.
        """
        usual = self._held.value / self._steps.value
        together = (use.free + use.held) / usual
        besides = use.sequences + max(0.0, use.free - use.margin) / usual
        return max(1, int(min(together, besides) + 1e-9))
