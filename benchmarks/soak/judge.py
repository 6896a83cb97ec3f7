"""What a soak must have been like: deciding only, from what was written down."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

MIB = 1024 * 1024
Series = Sequence[tuple[float, float]]
"""Values by time, in seconds."""

WARM_UP = 0.25
"""The share of the load at its beginning in which a worker may still grow: imports, caches, connections."""
TOLERANCES: Mapping[str, tuple[float, float]] = {
    "rss": (0.05, 8 * MIB),
    "tasks": (0.1, 16),
    "threads": (0.0, 2),
    "fds": (0.0, 4),
}
"""How much larger the last third's median may be than the first third's: relative, and in addition absolute. What leaks
with every request is far beyond it after some hundreds."""
LEAST_SAMPLES = 4
"""In each third: fewer say nothing."""


@dataclass(frozen=True)
class Record:
    """What happened in a soak."""

    lease: float
    sent: Sequence[int]
    starts: Sequence[int]
    """The request of each start of a job, in order."""
    longest_job: float
    answers: Sequence[tuple[int | None, int]]
    """Of each response: its request and its status code."""
    leases_lost: int
    """As the worker's log has it."""
    exit_code: int
    load: tuple[float, float]
    """When the backlog was kept up, and the worker busy."""
    series: Mapping[str, Series]
    """Of each name in `TOLERANCES`."""


def breaches(record: Record) -> list[str]:
    """Everything that was not as it must be, a line each; empty if all was well."""
    return [*_deliveries(record), *_answers(record), *_growth(record)]


def _deliveries(record: Record) -> Iterator[str]:
    again = {number: times for number, times in Counter(record.starts).items() if times > 1}
    if again:
        yield f"premature redelivery: {len(again)} requests were started more than once, such as {_some(again)}"
    if record.leases_lost:
        yield f"premature redelivery: the worker lost {record.leases_lost} leases"
    if record.longest_job <= record.lease:
        yield f"nothing was proved: no job was longer than the lease of {record.lease:g} s"
    if record.exit_code:
        yield f"the worker ended with {record.exit_code}"


def _answers(record: Record) -> Iterator[str]:
    count = Counter(number for number, _ in record.answers)
    missing = set(record.sent) - set(count)
    if missing:
        yield f"lost: {len(missing)} of {len(record.sent)} requests have no answer, such as {_some(missing)}"
    if strange := set(count) - set(record.sent):
        yield f"strange: {len(strange)} answers to what was not asked, such as {_some(strange)}"
    if twice := [number for number, times in count.items() if times > 1]:
        yield f"answered twice: {len(twice)} requests, such as {_some(twice)}"
    if failed := [(number, status) for number, status in record.answers if status != 200]:
        yield f"failed: {len(failed)} answers have another status than 200, such as {_some(failed)}"
    if not record.sent:
        yield "nothing was proved: nothing was sent"


def _growth(record: Record) -> Iterator[str]:
    begin, end = record.load
    warm = begin + WARM_UP * (end - begin)
    third = (end - warm) / 3
    for name, (relative, absolute) in TOLERANCES.items():
        series = record.series.get(name, ())
        first = [value for at, value in series if warm <= at < warm + third]
        last = [value for at, value in series if end - third <= at < end]
        if min(len(first), len(last)) < LEAST_SAMPLES:
            yield f"nothing was proved: {name} was sampled too seldom ({len(first)} and {len(last)} times)"
        elif median(last) > median(first) * (1 + relative) + absolute:
            yield f"growth: {name} from {figure(name, median(first))} to {figure(name, median(last))}"


def figure(name: str, value: float) -> str:
    """A value of a series, for people."""
    return f"{value / MIB:.1f} MiB" if name == "rss" else f"{value:g}"


def _some(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in sorted(items, key=str)[:3])
