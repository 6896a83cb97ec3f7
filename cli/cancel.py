"""`rejoinder cancel`."""

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from rejoinder.cli.errors import ExitCode, Failure
from rejoinder.cli.running import refuse_memory, run, say
from rejoinder.client.cancel import cancel as leave_marks
from rejoinder.client.cancel import cancels_of, queue_file


def cancel(
    ids: Annotated[list[str], typer.Argument(metavar="ID", help="Message ids or inference ids; -: lines of stdin.")],
    requests: Annotated[
        str | None, typer.Option(help="The workers' --requests: enough for sqlite://.", metavar="URL")
    ] = None,
    blobs: Annotated[
        str | None, typer.Option(help="The workers' --blobs: enough for all but sqlite://.", metavar="URL")
    ] = None,
    cancels: Annotated[
        str | None, typer.Option(help="The workers' --cancels, if they have any.", metavar="URL")
    ] = None,
) -> None:
    """Ask the workers to end requests: answered 499, not run further.

    Leaves a mark for each id where the workers look for it. What a worker holds ends within 2 s; what it gets later is
    not run. A request that has its answer already keeps it.
    """
    url = cancels_of(requests=requests, cancels=cancels, blobs=blobs)
    refuse_memory(url)
    if cancels is None and requests is not None and requests.startswith("sqlite:"):
        _look_for_queue(requests)
    try:
        count = run(leave_marks(url, list(_ids(ids))))
    except UnicodeDecodeError as exc:
        raise Failure(f"stdin is not UTF-8: {exc.reason}", ExitCode.USAGE) from exc
    except ValueError as exc:
        raise Failure(str(exc), ExitCode.USAGE) from exc
    marks = "1 mark" if count == 1 else f"{count} marks"
    say(f"left {marks} in {url}")


def _look_for_queue(requests: str) -> None:
    """Raise Failure where the marks would be beside nothing: nobody would ever look there."""
    if not queue_file(requests).exists():
        raise Failure(f"there is no queue in {requests!r}: its file does not exist", ExitCode.FAILED)


def _ids(given: list[str]) -> Iterator[str]:
    """The ids, with stdin's lines in place of `-`; blank lines are skipped."""
    for one in given:
        if one == "-":
            lines = (line.decode().removesuffix("\n").removesuffix("\r") for line in sys.stdin.buffer)
            yield from (line for line in lines if line.strip())
        else:
            yield one
