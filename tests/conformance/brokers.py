"""The adapters that the conformance suite runs against, and what each of them can do.

A new adapter is one more `Broker` in `BROKERS`: how to make a queue, and where it differs.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import aws_resources
import pubsub_resources

from rejoinder.adapters import memory


@dataclass(frozen=True)
class Queue:
    """The URLs of one queue."""

    subscription: str
    topic: str
    dead_letter: str | None
    """The subscription of its dead-letter queue."""
    respelled: str
    """The subscription again, its URL written otherwise."""


@dataclass(frozen=True)
class Broker:
    name: str
    make: Callable[[Path, float, int | None], Awaitable[Queue]]
    """Make a queue that nobody has used: (a directory of the test, lease in seconds, max_attempts)."""
    short_lease: float
    """The shortest lease worth testing with, seconds."""
    patience: float
    """After how many seconds without an expected message a test fails."""
    counts_attempts: bool = True
    counts_without_policy: bool = True
    """Whether attempts are counted also where there is no dead-letter policy."""
    least_attempts: int = 1
    """The smallest `max_attempts` that a dead-letter policy takes."""
    buries: bool = True
    """Whether dead letters can be tested."""
    carries_empty: bool = True
    """Whether a message may have neither body nor attributes."""
    says_sent_at: bool = True
    relays: bool = False
    """Whether the queue gets a message only after it was published: a topic hands it on."""
    orders_keys: bool = True
    """Whether messages of one ordering key come in the order of publishing."""
    keeps_order: bool = True
    """Whether one consumer gets messages without an ordering key in the order of publishing."""
    tells_lost: bool = True
    """Whether settling what another delivery has taken, or what is gone, is `LeaseLost`."""
    acks_late: bool = True
    """Whether a lease that has ended, and has passed to nobody else, can be acked."""
    renews_late: bool = True
    """Whether such a lease can be renewed."""
    tells_backlog: bool = True
    """Whether `backlog` is exact and at once."""
    dead_count_afresh: bool = True
    """Whether the deliveries from a dead-letter queue are counted from 1 again."""
    filler: bytes = b"\0"
    """What the largest body is made of."""
    across_processes: bool = True
    carries_pointers: bool = False
    """Whether a message may be only a pointer to where its body is stored."""
    service: str | None = None
    """The fixture that has its service running."""


async def _memory(_directory: Path, lease: float, max_attempts: int | None) -> Queue:
    url = memory.fresh_url(f"lease={lease}")
    bare = url.partition("?")[0]
    if max_attempts is None:
        return Queue(url, bare, None, f"{bare}?lease={lease + 1}")
    url += f"&max_attempts={max_attempts}"
    return Queue(url, bare, f"{bare}-dead", f"{bare}?max_attempts={max_attempts}&lease={lease}")


async def _sqlite(directory: Path, lease: float, max_attempts: int | None) -> Queue:
    file = f"sqlite:///{directory}/q.db"
    bare = f"{file}?queue=work"
    if max_attempts is None:
        return Queue(f"{bare}&lease={lease}", bare, None, f"sqlite:///{directory}/./q.db?lease=7&queue=work")
    policy = f"max_attempts={max_attempts}&dead_letter=graves"
    return Queue(
        f"{bare}&lease={lease}&{policy}", bare, f"{file}?queue=graves", f"{file}?{policy}&queue=%77ork&lease={lease}"
    )


async def _pubsub(_directory: Path, lease: float, max_attempts: int | None, **settings: bool) -> Queue:
    subscription, topic, dead = await pubsub_resources.make(lease, max_attempts, **settings)
    return Queue(
        f"gcppubsub://{subscription}",
        f"gcppubsub://{topic}",
        dead and f"gcppubsub://{dead}",
        f"gcppubsub://{subscription}?endpoint=localhost:1",  # the emulator's address goes before it
    )


async def _sqs(_directory: Path, lease: float, max_attempts: int | None, *, fifo: bool = False) -> Queue:
    queue, dead = await aws_resources.make_queue(fifo=fifo, max_attempts=max_attempts)
    return _sqs_queue(queue, dead, lease, f"awssqs:///{aws_resources.name_of(queue)}")


async def _sns(_directory: Path, lease: float, max_attempts: int | None) -> Queue:
    queue, dead = await aws_resources.make_queue(max_attempts=max_attempts)
    return _sqs_queue(queue, dead, lease, f"awssns:///{await aws_resources.make_topic(queue)}")


def _sqs_queue(queue: str, dead: str | None, lease: float, topic: str) -> Queue:
    *_, region, account, name = queue.split(":")
    return Queue(
        f"awssqs:///{name}?lease={lease:g}",
        topic,
        dead and f"awssqs:///{aws_resources.name_of(dead)}",
        f"awssqs://sqs.{region}.amazonaws.com/{account}/{name}",
    )


# LocalStack takes stale receipts for good ones, and deletes by them; SQS's standard queues may, too. Counts are
# approximate. A body that is no text takes a third more than its size.
sqs = partial(
    Broker,
    short_lease=2,
    patience=60,
    keeps_order=False,
    tells_lost=False,
    renews_late=False,
    tells_backlog=False,
    dead_count_afresh=False,
    filler=b"x",
    service="aws",
)

# The emulator also takes a lease of a second; the service's shortest is ten.
pubsub = partial(
    Broker,
    short_lease=1,
    patience=60,
    counts_without_policy=False,
    least_attempts=5,
    carries_empty=False,
    keeps_order=False,
    tells_lost=False,
    tells_backlog=False,
    service="gcp",
)

BROKERS = (
    Broker("memory", _memory, short_lease=0.2, patience=60, across_processes=False),
    Broker("sqlite", _sqlite, short_lease=0.2, patience=60),
    sqs("sqs", _sqs, orders_keys=False, carries_pointers=True),
    sqs("sqs-fifo", partial(_sqs, fifo=True), acks_late=False, carries_pointers=True),
    sqs("sns", _sns, orders_keys=False, relays=True),
    pubsub("pubsub", _pubsub, orders_keys=False),
    # The emulator fails every pull of an ordered subscription that has a message to bury.
    pubsub("pubsub-ordered", partial(_pubsub, enable_message_ordering=True), buries=False),
    # The emulator takes stale acks here too: tests/adapters/test_pubsub_exactly_once.py has what the service says.
    pubsub("pubsub-exactly-once", partial(_pubsub, enable_exactly_once_delivery=True), orders_keys=False),
)
