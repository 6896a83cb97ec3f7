"""How far long work is: a live line on a terminal, a plain one now and then elsewhere. On stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rejoinder.cli.running import say

EVERY_SECONDS = 10.0
"""Between plain lines: few enough for a log."""

Count = Callable[[int], None]


@contextmanager
def counting(doing: str, total: int | None = None) -> Iterator[Count]:
    """Show how much is done; call what this gives with how much more that is.

    Args:
        doing: What is shown before the count.
        total: How much there is to do, if that is known.
    """
    if not sys.stderr.isatty():
        yield _plain(doing, total)
    elif sys.stdout.isatty():  # results and a live line on one screen would overwrite each other
        yield lambda _more: None
    else:
        with _live(doing, total) as count:
            yield count


def _plain(doing: str, total: int | None) -> Count:
    done, shown = 0, time.monotonic()
    of = "" if total is None else f" of {total}"

    def count(more: int) -> None:
        nonlocal done, shown
        done += more
        if time.monotonic() >= shown + EVERY_SECONDS:
            shown = time.monotonic()
            say(f"{doing}: {done}{of}")

    return count


@contextmanager
def _live(doing: str, total: int | None) -> Iterator[Count]:
    from rich.console import Console  # noqa: PLC0415  # rich costs 0.1 s of imports: only where it is seen
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(doing, total=total)
        yield lambda more: progress.advance(task, more)
