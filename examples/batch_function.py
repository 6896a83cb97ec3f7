r"""A decorated batch function with typed requests: quotes from a database of prices, many in one query.

What waits is put into one call, so a thousand requests are some thirty queries. Requests of different catalogues never
share a call (`key`). A request that pydantic does not take is answered 400 before any call; an article that is not sold
is an answer of its own (`BadRequest`), and its neighbours get theirs; while somebody replaces the prices, the whole
call comes back later (`RetryableError`).

    python examples/batch_function.py prices.db
    rejoinder worker --app-dir examples --app batch_function --app-params '{"database": "prices.db"}' \
        --requests 'sqlite:///work.db?queue=requests' --responses 'sqlite:///work.db?queue=responses' &
    rejoinder publish --requests 'sqlite:///work.db?queue=requests' examples/batch_function.jsonl
    rejoinder join examples/batch_function.jsonl 'sqlite:///work.db?queue=responses'
"""

import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from rejoinder.worker.functions import BadRequest, RetryableError, generate_batch, init

PRICES = [("eu", "chair", 4900), ("eu", "table", 19900), ("us", "chair", 5500), ("us", "lamp", 2500)]


class Deployment(BaseModel):
    """The custom object, `--app-params`."""

    database: Path


class Order(BaseModel):
    """The body of a request."""

    catalogue: Literal["eu", "us"]
    article: str
    quantity: int = Field(ge=1, le=1000)


class Quote(BaseModel):
    """The body of a response."""

    article: str
    cents: int


@init
def find_prices(deployment: Deployment) -> Path:
    """Runs once in each process, before it is ready: a worker without its prices does not start."""
    if not deployment.database.is_file():
        raise FileNotFoundError(f"{deployment.database}: make it with python examples/batch_function.py")
    return deployment.database


@generate_batch("/quote", max_batch_size=64, max_wait_ms=20, key=lambda order: order.catalogue)
def quote(orders: list[Order], state: Path) -> list[Quote | Exception]:
    """One answer for each order, by position. An exception is the answer to its order alone."""
    articles = sorted({order.article for order in orders})
    query = f"SELECT article, cents FROM prices WHERE catalogue = ? AND article IN ({', '.join('?' * len(articles))})"  # noqa: S608
    try:
        # A connection of its own: a call runs in any thread.
        with closing(sqlite3.connect(state, timeout=0)) as database:
            prices = dict(database.execute(query, [orders[0].catalogue, *articles]))
    except sqlite3.OperationalError as exc:
        raise RetryableError(f"the prices are being replaced: {exc}", delay=2) from exc
    return [_quote(order, prices) for order in orders]


def _quote(order: Order, prices: dict[str, int]) -> Quote | Exception:
    if order.article not in prices:
        return BadRequest(f"no {order.article} is sold in {order.catalogue}", param="article")
    return Quote(article=order.article, cents=prices[order.article] * order.quantity)


if __name__ == "__main__":
    with closing(sqlite3.connect(sys.argv[1])) as database, database:
        database.execute("CREATE TABLE prices (catalogue TEXT, article TEXT, cents INTEGER)")
        database.executemany("INSERT INTO prices VALUES (?, ?, ?)", PRICES)
