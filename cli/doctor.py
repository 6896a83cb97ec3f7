"""`rejoinder doctor`."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rejoinder.adapters import BadURL, Checkup, Finding, check_subscription, check_topic
from rejoinder.adapters.checkup import State
from rejoinder.cli.doctor_pair import check_pair, check_worker
from rejoinder.cli.errors import ExitCode, Failure
from rejoinder.cli.options import ConfigOption
from rejoinder.cli.running import run
from rejoinder.worker.settings import Settings, SettingsError, gather, resolve

LIMIT_SECONDS = 30.0
"""Of all the questions to one broker; each has a limit of its own, far below."""

STYLES = {"ok": "green", "advice": "yellow", "fail": "red", "unknown": "dim"}


@dataclass(frozen=True, slots=True)
class Line:
    """One finding, and of which side it is."""

    side: str
    finding: Finding


def doctor(
    *,
    requests: Annotated[
        str | None, typer.Option(help="URL that the worker pulls requests from.", metavar="URL", show_default=False)
    ] = None,
    responses: Annotated[
        str | None, typer.Option(help="URL that the worker publishes responses to.", metavar="URL", show_default=False)
    ] = None,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each finding as a line of JSON.")] = False,
) -> None:
    """Check the queues, and say what to do: permissions, lease, dead letters, retention, sizes.

    Looks at either URL or at both, as the worker of these settings would use them, and touches no message. Each
    finding is ok, advice (it works, and could be better), fail (it would not work, or would lose something) or
    unknown. The exit code is 1 where anything fails.
    """
    settings, sides = _settings(requests, responses, config)
    with Console(stderr=True).status("looking at the queues"):
        lines = run(_look(settings, sides))
    _show(lines, as_json=as_json)
    if any(line.finding.state == "fail" for line in lines):
        raise typer.Exit(ExitCode.FAILED)


def _settings(requests: str | None, responses: str | None, config: Path | None) -> tuple[Settings, list[str]]:
    """The worker's settings, and which of its URLs there are. What the model is does not matter here."""
    flags: dict[str, Any] = {"requests": requests, "responses": responses}
    try:
        values, _ = gather(flags, config=config)
        sides = [side for side in flags if side in values]
        if not sides:
            raise Failure("name a queue with --requests URL, --responses URL or both", ExitCode.USAGE)
        missing = {side: "-" for side in flags if side not in sides}
        if "model" not in values and values.get("engine") != "echo":
            missing["model"] = "-"
        given = {name: value for name, value in flags.items() if value is not None}
        return resolve({**missing, **given}, config=config).settings, sides
    except SettingsError as exc:
        raise Failure(str(exc), ExitCode.USAGE) from exc


async def _look(settings: Settings, sides: list[str]) -> list[Line]:
    """Look at both sides at once, then at how they go together."""
    looks: dict[str, Callable[[str], Coroutine[Any, Any, Checkup]]] = {
        "requests": check_subscription,
        "responses": check_topic,
    }
    done = await asyncio.gather(*(_limited(looks[side](getattr(settings, side))) for side in sides))
    checkups = dict(zip(sides, done, strict=True))
    lines = [Line(side, finding) for side, checkup in checkups.items() for finding in checkup.findings]
    if "requests" in checkups:
        lines += (Line("worker", finding) for finding in check_worker(settings, checkups["requests"]))
    if len(checkups) == 2:
        lines += (
            Line("both", finding) for finding in check_pair(settings, checkups["requests"], checkups["responses"])
        )
    return lines


async def _limited(look: Coroutine[Any, Any, Checkup]) -> Checkup:
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            return await look
    except BadURL:
        raise
    except TimeoutError:
        todo = "is it running, and do the URL and the environment name the right endpoint?"
        return Checkup([Finding("reachable", "fail", f"no answer within {LIMIT_SECONDS:g} s", todo)])
    except Exception as exc:  # noqa: BLE001  # of one side: what is known of the other is still worth telling
        todo = "please report this: it is a fault of the check"
        return Checkup([Finding("checks", "fail", f"{type(exc).__name__}: {exc}", todo)])


def _show(lines: list[Line], *, as_json: bool) -> None:
    if as_json:
        for line in lines:
            typer.echo(json.dumps({"side": line.side, **asdict(line.finding)}, ensure_ascii=False))
        return
    if sys.stdout.isatty():
        Console().print(_table(lines))
    else:
        for text in _plain(lines):
            typer.echo(text)
    typer.echo(_summary(line.finding.state for line in lines))


def _table(lines: list[Line]) -> Table:
    table = Table("", "", "", "", box=None, show_header=False, padding=(0, 2, 0, 0))
    side = ""
    for line in lines:
        finding = line.finding
        text = Text(finding.fact)
        if finding.todo:
            text.append(f"\n→ {finding.todo}", style="bold")
        state = Text(finding.state, style=STYLES[finding.state])
        table.add_row(line.side if line.side != side else "", state, finding.check, text)
        side = line.side
    return table


def _plain(lines: Iterable[Line]) -> Iterator[str]:
    for line in lines:
        finding = line.finding
        yield f"{finding.state:7} {line.side}: {finding.check}: {finding.fact}"
        if finding.todo:
            yield f"{'':7} -> {finding.todo}"


def _summary(states: Iterable[State]) -> str:
    counts = Counter(states)
    return ", ".join(f"{counts[state]} {state}" for state in get_args(State) if counts[state] or state == "fail")
