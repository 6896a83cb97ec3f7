"""`rejoinder join`."""

import os
import shutil
import stat
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated

import typer

from rejoinder.cli.errors import ExitCode, Failure
from rejoinder.cli.progress import counting
from rejoinder.cli.running import BLOBS, refuse_memory, results, run, say
from rejoinder.client.index import Kind
from rejoinder.client.join import Join, Lines


def join(
    requests: Annotated[Path, typer.Argument(help="JSON lines of requests; - is stdin.")],
    responses: Annotated[str, typer.Argument(help="JSON lines of responses, or the URL to receive them from.")],
    *,
    on: Annotated[
        list[str] | None,
        typer.Option(help="Join by this key of metadata (a.b: b inside a), not by all of it. Repeatable."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: stdout.")] = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, help="Of a URL: end when this many seconds pass without a response.", show_default="never"),
    ] = None,
    blobs: Annotated[str | None, typer.Option(help=BLOBS, metavar="URL", show_default="none is read")] = None,
    show: Annotated[list[Kind] | None, typer.Option(help="List these lines on stderr. Repeatable.")] = None,
) -> None:
    """Put each response to its request, by the metadata it carries.

    One line for each request, in order: {"request": ..., "response": ...}, both as they were; null where none came.
    Metadata matches whatever the order of its keys; 1, 1.0 and true differ. Of several responses the first that
    succeeded is taken. A stream is one response, put together, once all of it is there.

    From a URL, responses are kept in REQUESTS.responses before they are acked, until every request has one: the same
    command, given again, goes on from there. It takes all responses of the queue: where some of them answer no request
    of REQUESTS, the file stays, for they are nowhere else.

    Exit codes: 3 where requests are unanswered; 1 where a line is malformed, two requests have the same metadata, or
    a request got responses that differ.
    """
    with ExitStack() as stack:
        requests_path = _regular(requests, stack)
        if "://" not in responses:
            responses_path = _regular(Path(responses), stack)
            _refuse_overwriting(output, requests_path, responses_path)
            joining = stack.enter_context(Join(requests_path, responses_path, on or [], _watch))
            joining.read_requests()
            joining.read_responses()
        elif requests_path == requests:
            joining = _receive(requests, responses, on or [], stack, timeout=timeout, blobs=blobs)
            _refuse_overwriting(output, requests, _kept(requests))
        else:
            raise Failure("requests from a pipe can be joined only with a file of responses", ExitCode.USAGE)
        _write(joining, output)
        code = _report(joining, show or [])
        if code is ExitCode.DONE and "://" in responses:
            _drop_kept(requests, joining)
    raise typer.Exit(code)


def _kept(requests: Path) -> Path:
    return requests.with_name(f"{requests.name}.responses")


def _drop_kept(requests: Path, joining: Join) -> None:
    """Delete the kept responses, while the lock on them is held; unless somebody else's are among them.

    In any other case than success they stay: the next run goes on from them, and the line numbers speak of them.
    """
    if unmatched := joining.counts[Kind.UNMATCHED]:
        which = "1 response answers" if unmatched == 1 else f"{unmatched} responses answer"
        say(f"{which} none of these requests and may be somebody else's: all are kept in {_kept(requests)}")
    else:
        _kept(requests).unlink()


def _receive(
    requests: Path, url: str, on: list[str], stack: ExitStack, *, timeout: float | None, blobs: str | None
) -> Join:
    refuse_memory(url)
    from rejoinder.client.collect import collect, open_kept  # noqa: PLC0415  # a join of two files needs no broker

    kept = stack.enter_context(open_kept(_kept(requests)))
    joining = stack.enter_context(Join(requests, _kept(requests), on))
    joining.read_requests()
    joining.read_responses()
    say(f"keeping responses in {_kept(requests)} until every request has one")
    shown = 0
    with counting("answered", joining.requests - joining.counts[Kind.AMBIGUOUS]) as count:

        def progress() -> None:
            nonlocal shown
            count(joining.answered - shown)
            shown = joining.answered

        progress()
        run(collect(joining, url, kept, idle=timeout, blobs=blobs, progress=progress))
    return joining


def _write(joining: Join, output: Path | None) -> None:
    with nullcontext(results()) if output is None else output.open("wb") as out:
        for line in joining.joined():
            out.write(line)
            out.write(b"\n")
        out.flush()
        if stat.S_ISREG(os.fstat(out.fileno()).st_mode):
            os.fsync(out.fileno())  # before the kept responses go


def _report(joining: Join, show: list[Kind]) -> ExitCode:
    for kind in show:
        for problem in joining.problems(kind):
            say(f"{kind.value}: {problem.text}")
    counts = {kind: joining.counts[kind] for kind in Kind}
    counts |= {Kind.MISSING: joining.missing, Kind.FAILED: joining.failed}
    say(f"{'requests':<12}{joining.requests:>10}")
    say(f"{'joined':<12}{joining.answered:>10}")
    for kind, number in counts.items():
        say(f"{kind.value:<12}{number:>10}")
    if counts[Kind.CONFLICTING] or counts[Kind.MALFORMED] or counts[Kind.AMBIGUOUS]:
        return ExitCode.FAILED
    return ExitCode.INCOMPLETE if counts[Kind.MISSING] else ExitCode.DONE


def _regular(path: Path, stack: ExitStack) -> Path:
    """The file itself, or a temporary copy of what comes through a pipe: both files are read more than once."""
    if path.is_file():
        return path
    copy = stack.enter_context(NamedTemporaryFile(prefix="rejoinder-join-"))  # noqa: SIM115  # the stack closes it
    if str(path) == "-":
        shutil.copyfileobj(sys.stdin.buffer, copy)
    else:
        with path.open("rb") as pipe:
            shutil.copyfileobj(pipe, copy)
    copy.flush()
    return Path(copy.name)


def _refuse_overwriting(output: Path | None, *inputs: Path) -> None:
    if output is not None and any(output.exists() and path.exists() and output.samefile(path) for path in inputs):
        raise Failure(f"{output} is read: the output needs a file of its own", ExitCode.USAGE)


def _watch(doing: str, lines: Lines) -> Lines:
    def watched() -> Lines:
        with counting(doing) as count:
            for number, item in enumerate(lines, 1):
                yield item
                if number % 1024 == 0:
                    count(1024)

    return watched()
