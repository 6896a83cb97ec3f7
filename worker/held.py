"""What the consumer knows of each message that it holds, and of all it has held."""

import asyncio
import enum
from dataclasses import dataclass, field

from rejoinder.adapters import Message
from rejoinder.worker.handler import Job
from rejoinder.worker.lease import Lease
from rejoinder.worker.room import Share
from rejoinder.worker.streaming import StreamWriter


class Stage(enum.Enum):
    """How far a held message has come."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    SETTLING = enum.auto()


@dataclass(slots=True, eq=False)
class Held:
    """A message that this worker holds."""

    message: Message
    received: float
    stage: Stage = Stage.WAITING
    lease: Lease = field(init=False)
    task: asyncio.Task[None] = field(init=False)
    begun: bool = False
    """Its task has come to its first line."""
    answered: bool = False
    """Its answer is durable: only the ack is left, and a lease that is gone from now on is gone by it."""
    job: Job | None = None
    """What it asks for, once that was found to be in order."""
    turn: asyncio.Future[None] | None = None
    """Done when its turn among those of its ordering key has come; None where it never waits for any."""
    share: Share | None = None
    """What its input has of the room for inputs."""
    stream: StreamWriter | None = None
    """What writes its stream, where it asks for one."""
    settling: bool = False
    """It was given to the settlement, which says when it is done with it."""
    abandoned: bool = False
    """Its work was stopped: no answer may follow, even if the work ended at that very moment."""
    leaving: bool = False
    """It is being handed back."""

    def waits(self, waiting: bool) -> None:
        """See `EngineRequest.waits`: what the engine has not let in is not started, and goes back first."""
        self.stage = Stage.WAITING if waiting else Stage.RUNNING

    def abandon(self) -> None:
        """Stop its work. A task that has not begun ends when it does: cancelled now, it would never run a line."""
        self.abandoned = True
        if self.begun:
            self.task.cancel()


@dataclass(slots=True)
class Counts:
    """What became of the messages, since the start."""

    received: int = 0
    answered: int = 0
    failed: int = 0
    """Of the answered ones, those with status 400 and above."""
    retried: int = 0
    handed_back: int = 0
    lease_lost: int = 0
