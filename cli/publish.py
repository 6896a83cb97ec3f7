"""`rejoinder publish`."""

import sys
import time
from contextlib import aclosing, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from rejoinder.cli.errors import ExitCode
from rejoinder.cli.progress import Count, counting
from rejoinder.cli.running import refuse_memory, results, run, say
from rejoinder.client.lines import stream_lines
from rejoinder.client.publish import Outcome, Publisher


def publish(
    requests: Annotated[str, typer.Option(help="URL of the queue or topic that the worker pulls from.", metavar="URL")],
    file: Annotated[Path, typer.Argument(help="JSON lines of requests; - is stdin.")] = Path("-"),
    raw: Annotated[bool, typer.Option("--raw", help="Send each line as it is, without looking into it.")] = False,
) -> None:
    """Send JSON lines of requests; print their message ids.

    The ids come in the order of the lines, each when its request is durable. A line that is not a request is reported
    and left out; the others are sent, and the exit code is 1. Blank lines are skipped.
    """
    refuse_memory(requests)
    with nullcontext(sys.stdin.buffer) if str(file) == "-" else file.open("rb") as source:
        failed = run(_publish(requests, source.fileno(), check=not raw))
    if failed:
        raise typer.Exit(ExitCode.FAILED)


async def _publish(url: str, fd: int, *, check: bool) -> int:
    sent = failed = 0
    start = time.monotonic()
    with counting("published") as count:
        async with (
            Publisher(url) as publisher,
            aclosing(stream_lines(fd)) as lines,
            aclosing(publisher.publish_lines(lines, check=check)) as outcomes,
        ):
            async for some in outcomes:
                ids = _show(some, count)
                sent += ids
                failed += len(some) - ids
    problem = f", {failed} not" if failed else ""
    requests = "1 request" if sent == 1 else f"{sent} requests"
    say(f"published {requests} in {time.monotonic() - start:.1f} s{problem}")
    return failed


def _show(outcomes: list[Outcome], count: Count) -> int:
    """Print the ids, report the others; return how many ids there were."""
    ids = [outcome.result for outcome in outcomes if isinstance(outcome.result, str)]
    results().write("".join(f"{message_id}\n" for message_id in ids).encode())
    results().flush()
    for outcome in outcomes:
        if not isinstance(outcome.result, str):
            say(f"rejoinder publish: line {outcome.line.number} is not published: {outcome.result}")
    count(len(ids))
    return len(ids)
