"""What is compared: our worker, the bare loop on the same SDK, and other workers as their users run them."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.brokers import pubsub, sqs

PEERS = Path(__file__).parent / "peers"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
RECEIVERS = 16
"""Receives at once of the bare loop: as many as the worker has at most."""

Broker = Literal["sqs", "pubsub"]
MODULES = {"sqs": sqs, "pubsub": pubsub}
WORKER, LOOP, BODIES = "worker", "bare loop", "bodies only"


@dataclass(frozen=True)
class Side:
    """One of those that work off the backlog."""

    name: str
    how: str
    """Its settings, for the reader of the figures."""
    arguments: Sequence[str] = ()
    peer: str | None = None
    """The program in `peers` whose environment has what it needs; it has a message format of its own."""

    @property
    def floor(self) -> float:
        """What the worker's rate over this one's is to be at least."""
        return 0.8 if self.name in {LOOP, BODIES} else 1.5


PEER_SIDES: Mapping[Broker, Sequence[Side]] = {
    "sqs": [
        Side(
            "taskiq",
            "taskiq-aio-sqs: 1 process, receives of 10, 100 tasks at once, answers sent in batches of 10",
            ["--workers", "1", "--max-async-tasks", "100", "--max-prefetch", "100"],
            peer="taskiq",
        ),
        Side(
            "Celery",
            "Celery: 8 processes, receives of 10, prefetch 160, acks late",
            ["--concurrency", "8"],
            peer="celery",
        ),
        Side(
            "dramatiq",
            "dramatiq_sqs: 4 processes of 8 threads, receives of 10",
            ["--processes", "4", "--threads", "8"],
            peer="dramatiq",
        ),
    ],
    "pubsub": [Side("callback", "SubscriberClient.subscribe: 1,000 messages held, answers published in batches")],
}


def sides(broker: Broker, receivers: int) -> list[Side]:
    """The worker first, then what it is compared with."""
    batch = MODULES[broker].BATCH
    loop = f"1 process, {receivers} at once of: receive {batch}, send {batch}, delete {batch}"
    return [
        Side(WORKER, "rejoinder worker --engine echo: 1 process, default settings"),
        Side(LOOP, f"{loop}, with the attributes that the contract puts on messages"),
        Side(BODIES, f"{loop}, without attributes"),
        *PEER_SIDES[broker],
    ]


def command(side: Side, broker: Broker, places: tuple[str, str], messages: int, receivers: int) -> list[str]:
    """What works off the backlog; without the interpreter for a module, so that calls can be counted."""
    module = MODULES[broker]
    if side.peer:
        return peer(side.peer, "work", *side.arguments)
    if side.name == WORKER:
        ends = ["--requests", module.url(places[0]), "--responses", module.url(places[1])]
        return ["rejoinder.cli.main", "worker", "--engine", "echo", *ends]
    if side.name in {LOOP, BODIES}:
        kind = "attributes" if side.name == LOOP else "bodies"
        return [f"benchmarks.brokers.{broker}", "bare", *places, str(messages), str(receivers), kind]
    return [f"benchmarks.brokers.{broker}", "callback", *places]


def peer(name: str, *arguments: str) -> list[str]:
    """Run a peer's program in an environment of its own, which uv makes on first use, in the user's cache."""
    uv = shutil.which("uv")
    if uv is None:
        raise SystemExit("the peers' environments are made by uv, which is not on the PATH: pip install uv")
    own = ["--no-project", "--python", PYTHON, "--with-requirements", str(PEERS / f"{name}.txt")]
    return [uv, "run", "-q", *own, "python", str(PEERS / f"{name}_app.py"), *arguments]
