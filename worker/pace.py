"""How fast requests complete and how long a receive takes: what sizes the prefetch. And how long the engine waited."""

import math

# Weight of the newest observation: the last dozen or so decide, so a change of load shows within seconds.
ALPHA = 0.15
# The steady rate of completions is that of about so long: a whole batch that completes in one step shows little in it.
STEADY_SECONDS = 2.0


class Pace:
    """Moving averages. All times are the event loop's, in seconds."""

    def __init__(self) -> None:
        self._round_trip = 0.0
        self._interval: float | None = None
        self._last_completion: float | None = None
        self._rate = 0.0

    def received(self, seconds: float) -> None:
        """A receive that returned messages took this long."""
        self._round_trip += ALPHA * (seconds - self._round_trip)

    def completed(self, now: float) -> None:
        """A request completed. Those of one engine step come together, hence the average over intervals."""
        if self._last_completion is not None:
            gap = now - self._last_completion
            self._rate *= math.exp(-gap / STEADY_SECONDS)
            self._interval = gap if self._interval is None else self._interval + ALPHA * (gap - self._interval)
        self._rate += 1.0 / STEADY_SECONDS
        self._last_completion = now

    def completed_in_one_receive(self) -> float:
        """How many requests complete while one receive is under way, with as many again for its jitter.

        After a step that completed many, as many as if that went on: that is what it takes to fill their places.
        """
        if not self._interval:
            return 1.0
        return 2.0 * self._round_trip / self._interval

    def steadily_in_one_receive(self, now: float) -> float:
        """The same, whatever completed together: more than are run at once where each is shorter than a receive."""
        if self._last_completion is None:
            return 0.0
        return 2.0 * self._round_trip * self._rate * math.exp((self._last_completion - now) / STEADY_SECONDS)


class Waits:
    """Time that the engine spent without any request although one was there for it, at the broker or in the worker.

    Args:
        now: The event loop's time.
    """

    def __init__(self, now: float) -> None:
        self.seconds = 0.0
        self._running = 0
        self._empty_since = now

    def started(self, now: float, since: float) -> None:
        """A request went to the engine that could have been fetched `since` then."""
        if not self._running:
            self.seconds += max(0.0, now - max(since, self._empty_since))
        self._running += 1

    def ended(self, now: float) -> None:
        """A request has come back from the engine."""
        self._running -= 1
        self._empty_since = now
