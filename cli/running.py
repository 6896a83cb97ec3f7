"""How commands run what is asynchronous, and write results."""

import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any, BinaryIO, TypeVar

import typer

from rejoinder.cli.errors import ExitCode, Failure

T = TypeVar("T")

TERMINATED = 128 + signal.SIGTERM
BLOBS = "URL of the store that responses which are only pointers (--extended-client) may be read from."
"""What the option of that name is, for each command that receives responses."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end. SIGINT and SIGTERM cancel it, so that it lets go of what it holds.

    Raises:
        KeyboardInterrupt: SIGINT came.
        typer.Exit: SIGTERM came; with the code that shells know for it.
    """

    async def until_terminated() -> T:
        task = asyncio.current_task()
        if task is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await main

    try:
        return asyncio.run(until_terminated())
    except asyncio.CancelledError:
        raise typer.Exit(TERMINATED) from None


def refuse_memory(url: str) -> None:
    """Refuse a queue that nobody else can see.

    Raises:
        Failure: it is one.
    """
    if url.partition("://")[0] == "memory":
        raise Failure(f"{url} is inside this process and gone with it: no worker can see it", ExitCode.USAGE)


def results() -> BinaryIO:
    """Stdout as bytes."""
    return sys.stdout.buffer


def say(message: str) -> None:
    """Tell the user, on stderr."""
    typer.echo(message, err=True)
