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
from typing import Annotated, Any
from urllib.parse import quote
from uuid import uuid4

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rejoinder.cli.demo_report import Row, show_table, stdout_console, summary
from rejoinder.cli.demo_requests import demo_requests
from rejoinder.cli.demo_worker import DemoWorker, start_worker
from rejoinder.cli.errors import Failure
from rejoinder.cli.running import run
from rejoinder.client.consume import Received, responses
from rejoinder.client.join import Join
from rejoinder.client.publish import Publisher
from rejoinder.worker.engines.factory import PACKAGED_MODEL
from rejoinder.worker.errors import EngineGone
from rejoinder.worker.settings import SettingsError, resolve

ANSWER_SECONDS = 300.0
"""Without any answer for this long, with a worker that is up, something is wrong."""

HELLO: dict[str, Any] = {"path": "/v1/completions", "metadata": {}, "body": {"prompt": "Hello", "max_tokens": 1}}
"""Sent ahead: its answer says that the model is loaded, so that the table's times are of the work alone."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one run of the demo keeps its things."""

    directory: Path
    run: str

    def url(self, queue: str) -> str:
        """Of one of its queues: other runs in the same directory have their own."""
        return f"sqlite:///{quote(str(self.directory / 'demo.db'))}?queue={queue}-{self.run}"

    def file(self, name: str) -> Path:
        """One of its files."""
        return self.directory / f"{name}-{self.run}"


def demo(
    *,
    model: Annotated[str, typer.Option(help="smollm2, a local directory, or a hub name.")] = PACKAGED_MODEL,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Keep queues, files and the worker's log here.", show_default="temporary"),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the temporary directory, and say where it is.")] = False,
) -> None:
    """Show it all working here: queues, the real model, joined answers.

    Starts a worker on two queues in a SQLite file, publishes a dozen requests and one that is wrong on purpose, and
    joins the answers to the prompts by their metadata. The first run prepares the model, once.
    """
    console = Console(stderr=True, soft_wrap=True)
    model = _prepared(model)
    place = Path(tempfile.mkdtemp(prefix="rejoinder-demo-")) if directory is None else directory.absolute()
    try:
        place.mkdir(parents=True, exist_ok=True)
        run(_demo(model, Place(place, uuid4().hex[:8]), console))
    finally:
        if directory is None and not keep:
            shutil.rmtree(place, ignore_errors=True)
        elif keep:
            console.print(f"kept in {place}")


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


async def _demo(model: str, place: Place, console: Console) -> None:
    requests = demo_requests()
    start = time.monotonic()
    async with (
        start_worker(model, place.url("requests"), place.url("responses"), place.file("worker.log")) as worker,
        Publisher(place.url("requests")) as publisher,
        aclosing(responses(place.url("responses"), count=1 + len(requests))) as incoming,
    ):
        with console.status("a worker starts and loads the model"):
            await publisher.publish(HELLO)
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
    worker: DemoWorker, incoming: AsyncGenerator[Received, None], place: Place, count: int, console: Console
) -> list[float]:
    """Write the answers to their file as they come; return when each came."""
    arrivals: list[float] = []
    columns = (TextColumn("answered"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar, place.file("responses.jsonl").open("wb") as out:
        task = bar.add_task("", total=count)
        while (received := await worker.watching(_next(incoming))) is not None:
            arrivals.append(time.monotonic())
            out.write(received.body + b"\n")
            bar.advance(task)
    return arrivals


async def _next(incoming: AsyncGenerator[Received, None]) -> Received | None:
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
