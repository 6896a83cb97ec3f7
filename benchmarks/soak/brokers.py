"""The queues of a soak, on each broker, with its lease."""

import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.brokers import pubsub, sqs


@dataclass(frozen=True)
class Urls:
    """What to pass to whom."""

    requests: str
    """For the worker."""
    responses: str
    """For the worker."""
    requests_in: str
    """Where requests are published."""
    responses_out: str
    """Where responses are received."""


@asynccontextmanager
async def on_sqs(lease: int, *, fifo: bool = False) -> AsyncIterator[Urls]:
    async with sqs.places(lease, fifo=fifo) as (requests, responses):
        yield Urls(sqs.url(requests), sqs.url(responses), sqs.url(requests), sqs.url(responses))


@asynccontextmanager
async def on_pubsub(lease: int) -> AsyncIterator[Urls]:
    async with pubsub.places(lease) as (requests, responses):
        yield Urls(
            requests=f"gcppubsub://{pubsub.subscription(requests)}",
            responses=f"gcppubsub://{pubsub.topic(responses)}",
            requests_in=f"gcppubsub://{pubsub.topic(requests)}",
            responses_out=f"gcppubsub://{pubsub.subscription(responses)}",
        )


@asynccontextmanager
async def on_sqlite(lease: int) -> AsyncIterator[Urls]:
    with tempfile.TemporaryDirectory() as folder:
        base = f"sqlite:///{Path(folder) / 'soak.db'}"
        requests, responses = f"{base}?queue=requests&lease={lease}", f"{base}?queue=responses"
        yield Urls(requests, responses, requests, responses)


BROKERS: Mapping[str, Callable[[int], AbstractAsyncContextManager[Urls]]] = {
    "sqs": on_sqs,
    "pubsub": on_pubsub,
    "sqlite": on_sqlite,
}
