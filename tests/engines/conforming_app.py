"""Functions of every kind, for the suite that every engine runs."""

import asyncio
import time
from typing import Any

from pydantic import BaseModel

from rejoinder.worker.functions import Context, generate, generate_batch, init


class Numbered(BaseModel):
    n: int
    text: str = ""


@init
def load(custom: dict[str, Any]) -> int:
    return int(custom["factor"])


@generate
def sync(body: Numbered, state: int) -> dict[str, Any]:
    time.sleep(0.001)
    return {"n": state * body.n, "text": body.text[::-1]}


@generate("/async")
async def on_the_loop(body: Any, state: int) -> Any:
    await asyncio.sleep(0.001)
    return [body, state]


@generate_batch("/batch", max_batch_size=4, key=lambda body: body.n % 2)
def together(bodies: list[Numbered], state: int) -> list[dict[str, Any]]:
    assert len({body.n % 2 for body in bodies}) == 1
    return [{"n": state * body.n, "text": body.text.upper()} for body in bodies]


@generate("/long")
def long(body: float, context: Context) -> str:
    end = time.monotonic() + body
    while time.monotonic() < end and not context.cancelled:
        time.sleep(0.005)
    return "at last"


@generate("/async-long")
async def long_on_the_loop(body: float) -> str:
    await asyncio.sleep(body)
    return "at last"
