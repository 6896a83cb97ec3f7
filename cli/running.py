"""How commands run what is asynchronous, and write results."""

import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any, BinaryIO, TypeVar

import typer

T = TypeVar("T")

TERMINATED = 128 + signal.SIGTERM


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


def results() -> BinaryIO:
    """Stdout as bytes."""
    return sys.stdout.buffer


def say(message: str) -> None:
    """Tell the user, on stderr."""
    typer.echo(message, err=True)
