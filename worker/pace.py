"""How fast requests complete and how long a receive takes: what sizes the prefetch."""

# Weight of the newest observation: the last dozen or so decide, so a change of load shows within seconds.
ALPHA = 0.15


class Pace:
    """Two moving averages. All times are the event loop's, in seconds."""

    def __init__(self) -> None:
        self._round_trip = 0.0
        self._interval: float | None = None
        self._last_completion: float | None = None

    def received(self, seconds: float) -> None:
        """A receive that returned messages took this long."""
        self._round_trip += ALPHA * (seconds - self._round_trip)

    def completed(self, now: float) -> None:
        """A request completed. Those of one engine step come together, hence the average over intervals."""
        if self._last_completion is not None:
            gap = now - self._last_completion
            self._interval = gap if self._interval is None else self._interval + ALPHA * (gap - self._interval)
        self._last_completion = now

    def completed_in_one_receive(self) -> float:
        """How many requests complete while one receive is under way, with as many again for its jitter."""
        if not self._interval:
            return 1.0
        return 2.0 * self._round_trip / self._interval
