"""`rejoinder consume`."""

import json
from contextlib import aclosing
from typing import Annotated

import typer

from rejoinder.cli.errors import ExitCode
from rejoinder.cli.progress import counting
from rejoinder.cli.running import BLOBS, refuse_memory, results, run, say
from rejoinder.client.consume import Received, responses
from rejoinder.client.lines import one_line


def consume(
    responses: Annotated[str, typer.Option(help="URL of the queue or subscription of responses.", metavar="URL")],
    count: Annotated[int | None, typer.Option(min=0, help="End after this many.", show_default="never")] = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, help="End when this many seconds pass without a response.", show_default="never"),
    ] = None,
    blobs: Annotated[str | None, typer.Option(help=BLOBS, metavar="URL", show_default="none is read")] = None,
    attributes: Annotated[
        bool, typer.Option("--attributes", help='Print {"attributes": ..., "response": ...} instead.')
    ] = False,
) -> None:
    """Receive responses; print them as JSON lines, each message of a stream by itself.

    Each is acked when its line is written. At least once: after a crash some may come again, as other deliveries of
    the same response. The exit code is 3 where fewer than --count came before the timeout.
    """
    refuse_memory(responses)
    seen = run(_consume(responses, count, timeout, blobs, attributes=attributes))
    if count is not None and seen < count:
        say(f"rejoinder consume: {seen} of {count} responses came, then none for {timeout:g} seconds")
        raise typer.Exit(ExitCode.INCOMPLETE)


async def _consume(url: str, count: int | None, idle: float | None, blobs: str | None, *, attributes: bool) -> int:
    seen = 0
    out = results()
    with counting("consumed", count) as more:
        async with aclosing(responses(url, count=count, idle=idle, blobs=blobs)) as incoming:
            async for received in incoming:
                out.write((_with_attributes(received) if attributes else one_line(received.body)) + b"\n")
                out.flush()  # before the next step of the loop, which acks
                seen += 1
                more(1)
    return seen


def _with_attributes(received: Received) -> bytes:
    response = one_line(received.body)
    try:
        json.loads(response)
    except ValueError:  # somebody else's message: as a string it does not break the line
        response = json.dumps(response.decode(errors="replace")).encode()
    own = json.dumps(dict(received.attributes), ensure_ascii=False).encode()
    return b'{"attributes":%b,"response":%b}' % (own, response)
