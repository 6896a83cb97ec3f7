"""An engine that dies of some requests and keeps a journal of what its processes ran; built in the engine process."""

import asyncio
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from rejoinder.worker.engines.protocol import EngineStats
from rejoinder.worker.errors import Unavailable

STEP_SECONDS = 0.01
WATCH_SECONDS = 0.25  # as the transformers engine notices the end of its generation thread


class Poisoned:
    paths = frozenset({"/do"})

    def __init__(self, config):
        self.capacity = config["capacity"]
        self.progress = 0
        self.stats = EngineStats()
        self.broken = asyncio.Event()
        self._journal = Path(config["journal"])

    def note(self, *words):
        with self._journal.open("a") as file:  # one write each: the lines of several processes do not mix
            file.write(" ".join(map(str, (os.getpid(), *words))) + "\n")

    async def start(self):
        self.note("born")

    async def generate(self, request):
        """Work for some steps; then answer, or do what the body's `kills` says.

        The work begins when as many requests as the body's `company` have ever come, each delivery for itself.
        """
        name, kills = request.body["n"], request.body.get("kills")
        self.note("in", name)
        try:
            while came(self._journal) < request.body.get("company", 0):
                await asyncio.sleep(STEP_SECONDS)
            for _ in range(request.body.get("steps", 1)):
                if self.broken.is_set():
                    raise Unavailable("the whole batch failed")
                await asyncio.sleep(STEP_SECONDS)
                self.progress += 1
            if kills == "exit":
                os._exit(9)
            if kills == "thread":  # all that run are told, and only then is the end noticed
                self.broken.set()
                raise Unavailable("the whole batch failed")
            if kills == "hang":
                await asyncio.Event().wait()
        except BaseException:
            if not self.broken.is_set():
                self.note("out", name)
            raise
        self.note("out", name)
        return name

    async def wait_gone(self):
        await self.broken.wait()
        await asyncio.sleep(WATCH_SECONDS)

    async def stop(self):
        self.note("stopped")


def create(config):
    return Poisoned(config)


def came(journal):
    """How many requests have come so far."""
    return sum(line.split()[1:2] == ["in"] for line in Path(journal).read_text().splitlines())


@dataclass
class Life:
    """What one process ran, what at once, and what was in it at the end."""

    inside: set = field(default_factory=set)
    ran: set = field(default_factory=set)
    together: list = field(default_factory=list)
    stopped: bool = False


def lives(journal):
    """The processes by their ids, in the order of their births."""
    found = defaultdict(Life)
    for line in Path(journal).read_text().splitlines():
        pid, what, *name = line.split()
        life = found[pid]
        if what == "in":
            life.inside.add(name[0])
            life.ran.add(name[0])
            life.together.append(frozenset(life.inside))
        elif what == "out":
            life.inside.discard(name[0])
        elif what == "stopped":
            life.stopped = True
    return list(found.values())


def deaths(journal):
    """What each process that died ran when it did."""
    return [life.inside for life in lives(journal) if life.inside and not life.stopped]
