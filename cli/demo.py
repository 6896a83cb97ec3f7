"""`rejoinder demo`."""

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import quote
from uuid import uuid4

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rejoinder.cli.demo_queues import Queues, own_answers
from rejoinder.cli.demo_report import Row, show_table, stdout_console, summary
from rejoinder.cli.demo_requests import demo_requests, hello
from rejoinder.cli.demo_worker import DemoWorker, start_worker
from rejoinder.cli.errors import Failure
from rejoinder.cli.running import run
from rejoinder.client.join import Join
from rejoinder.client.lines import one_line
from rejoinder.client.publish import Publisher
from rejoinder.worker.engines.factory import PACKAGED_MODEL
from rejoinder.worker.errors import EngineGone
from rejoinder.worker.settings import SettingsError, resolve

ANSWER_SECONDS = 300.0
"""Without any answer for this long, with a worker that is up, something is wrong."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one run of the demo keeps its things."""

    directory: Path
    run: str

    def url(self, queue: str) -> str:
        """Of one of its queues, where none was given: other runs in the same directory have their own."""
        return f"sqlite:///{quote(str(self.directory / 'demo.db'))}?queue={queue}-{self.run}"

    def file(self, name: str) -> Path:
        """One of its files."""
        return self.directory / f"{name}-{self.run}"


def demo(
    *,
    model: Annotated[str, typer.Option(help="smollm2, a local directory, or a hub name.")] = PACKAGED_MODEL,
    requests: Annotated[
        str | None, typer.Option(help="What the worker pulls requests from.", metavar="URL", show_default="in a file")
    ] = None,
    responses: Annotated[
        str | None,
        typer.Option(help="What the worker publishes responses to.", metavar="URL", show_default="in a file"),
    ] = None,
    publish_to: Annotated[
        str | None,
        typer.Option(
            help="Where requests are published: the topic of that subscription.",
            metavar="URL",
            show_default="--requests",
        ),
    ] = None,
    consume_from: Annotated[
        str | None,
        typer.Option(
            help="Where responses arrive: a subscription or queue of that topic.",
            metavar="URL",
            show_default="--responses",
        ),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Keep queues, files and the worker's log here.", show_default="temporary"),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the temporary directory, and say where it is.")] = False,
) -> None:
    """Show it all working here: queues, the real model, joined answers.

    Starts a worker on two queues in a SQLite file, or on the queues that are given, publishes a dozen requests and one
    that is wrong on purpose, and joins the answers to the prompts by their metadata. On queues that others use, their
    answers are left alone, but their requests are answered too. The first run prepares the model, once.
    """
    console = Console(stderr=True, soft_wrap=True)
    place = Place(_directory(directory), uuid4().hex[:8])
    queues = Queues(requests or place.url("requests"), responses or place.url("responses"), publish_to, consume_from)
    try:
        run(queues.check())
        run(_demo(_prepared(model), place, queues, console))
    finally:
        if directory is None and not keep:
            shutil.rmtree(place.directory, ignore_errors=True)
        elif keep:
            console.print(f"kept in {place.directory}")


def _directory(given: Path | None) -> Path:
    if given is None:
        return Path(tempfile.mkdtemp(prefix="rejoinder-demo-"))
    given.mkdir(parents=True, exist_ok=True)
    return given.absolute()


def _prepared(model: str) -> str:
    """Make the packaged model ready here, where its progress is seen, and not in the worker."""
    if model != PACKAGED_MODEL:
        return str(Path(model).absolute()) if Path(model).is_dir() else model
    from rejoinder.worker.engines.smollm2 import ensure  # noqa: PLC0415  # only where that model is asked for

    try:
        ensure(resolve({"requests": "-", "responses": "-", "model": model}).settings.cache)
    except (EngineGone, SettingsError) as exc:
        raise Failure(str(exc)) from exc
    return model


async def _demo(model: str, place: Place, queues: Queues, console: Console) -> None:
    requests = demo_requests(place.run)
    start = time.monotonic()
    async with (
        start_worker(model, queues.requests, queues.responses, place.file("worker.log")) as worker,
        Publisher(queues.sending) as publisher,
        aclosing(own_answers(queues.receiving, place.run, 1 + len(requests))) as incoming,
    ):
        with console.status("a worker starts and loads the model"):
            await publisher.publish(hello(place.run))
            await worker.watching(anext(incoming))
        console.print(f"a worker is up after {time.monotonic() - start:.1f} s; publishing {len(requests)} requests")
        published = time.monotonic()
        await asyncio.gather(*map(publisher.publish, requests))
        arrivals = await _answers(worker, incoming, place, len(requests), console)
        with console.status("the worker stops"):
            await worker.stop()
    _write(place.file("requests.jsonl"), [json.dumps(request).encode() for request in requests])
    _report(place, published, arrivals)


async def _answers(
    worker: DemoWorker, incoming: AsyncGenerator[bytes, None], place: Place, count: int, console: Console
) -> list[float]:
    """Write the answers to their file as they come; return when each came."""
    arrivals: list[float] = []
    columns = (TextColumn("answered"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar, place.file("responses.jsonl").open("wb") as out:
        task = bar.add_task("", total=count)
        while (answer := await worker.watching(_next(incoming))) is not None:
            arrivals.append(time.monotonic())
            out.write(one_line(answer) + b"\n")
            bar.advance(task)
    return arrivals


async def _next(incoming: AsyncGenerator[bytes, None]) -> bytes | None:
    try:
        return await asyncio.wait_for(anext(incoming, None), ANSWER_SECONDS)
    except TimeoutError:
        raise Failure(f"no answer came for {ANSWER_SECONDS:g} s") from None


def _report(place: Place, published: float, arrivals: list[float]) -> None:
    """Join the two files, and show what came of it.

    Raises:
        Failure: it is not what the demo promises.
    """
    with Join(place.file("requests.jsonl"), place.file("responses.jsonl")) as join:
        join.read_requests()
        join.read_responses()
        lines = {answer.request: answer.line for answer in join.answers()}
        joined = list(map(json.loads, join.joined()))
        all_joined = join.missing == 0 and not any(join.counts.values())
    rows = [
        Row(line["request"], line["response"], arrivals[lines[number] - 1] - published if number in lines else None)
        for number, line in enumerate(joined, 1)
    ]
    console = stdout_console()
    show_table(rows, console)
    console.print(summary(rows, max(arrivals) - published, all_joined=all_joined), soft_wrap=True, highlight=False)
    if not all_joined or not all(row.ok or row.refused_as_intended for row in rows):
        raise Failure("that is not what it should look like")


def _write(path: Path, lines: list[bytes]) -> None:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
