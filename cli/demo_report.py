"""What the demo shows in the end: a table of joined requests and responses, and a line of numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rejoinder.cli.demo_requests import REFUSED, prompt_of

PLAIN_WIDTH = 140
"""Columns of the table where no terminal says how many there are."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request and what came back."""

    request: dict[str, Any]
    response: dict[str, Any] | None
    seconds: float | None
    """From publish to answer."""

    @property
    def topic(self) -> str:
        """Of its metadata."""
        return str(self.request["metadata"]["topic"])

    @property
    def tokens(self) -> int:
        """That the model made."""
        body = (self.response or {}).get("body") or {}
        return int((body.get("usage") or {}).get("completion_tokens") or 0)

    @property
    def ok(self) -> bool:
        """Whether it was answered with success."""
        return self.response is not None and self.response["status_code"] == 200

    @property
    def refused_as_intended(self) -> bool:
        """Whether it is the wrong request, and the answer says so."""
        return self.topic == REFUSED and self.response is not None and self.response["status_code"] == 400

    @property
    def answer(self) -> str:
        """The text that the model made, or what was wrong."""
        if self.response is None:
            return "(no answer)"
        body = self.response["body"]
        if "error" in body:
            return str(body["error"]["message"])
        choice = body["choices"][0]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])


def show_table(rows: list[Row], console: Console) -> None:
    """Print the table; long texts end where the column does."""
    table = Table(expand=True)
    for name in ("id", "topic"):
        table.add_column(name, no_wrap=True)
    table.add_column("prompt", no_wrap=True, overflow="ellipsis", ratio=2)
    for name in ("status", "tokens", "seconds"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("answer", no_wrap=True, overflow="ellipsis", ratio=3)
    for row in rows:
        status = str(row.response["status_code"]) if row.response else "-"
        table.add_row(
            str(row.request["metadata"]["id"]),
            row.topic,
            _short(prompt_of(row.request)),
            Text(status, style="green" if row.ok else "yellow"),
            str(row.tokens),
            "-" if row.seconds is None else f"{row.seconds:.1f}",
            _short(row.answer),
        )
    console.print(table)


def summary(rows: list[Row], seconds: float, *, all_joined: bool) -> str:
    """The numbers in one line; `seconds` is from the first publish to the last answer."""
    refused = sum(row.refused_as_intended for row in rows)
    parts: Mapping[str, int] = {
        "ok": sum(row.ok for row in rows),
        "refused (as intended)": refused,
        "failed": sum(row.response is not None and not row.ok for row in rows) - refused,
    }
    numbers = [f"{number} {what}" for what, number in parts.items() if number or what != "failed"]
    rates = [f"{len(rows) / seconds:.1f} requests/s", f"{sum(row.tokens for row in rows) / seconds:.1f} tokens/s"]
    return ", ".join([f"{len(rows)} requests", *numbers, *rates, f"all joined: {'yes' if all_joined else 'no'}"])


def stdout_console() -> Console:
    """Stdout, wide enough for the table."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def _short(text: str) -> Text:
    return Text(" ".join(text.split()))
