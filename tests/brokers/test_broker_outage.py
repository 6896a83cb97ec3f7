"""A broker that is cut off, hangs, is slow or garbles for longer than a lease, in the midst of a run.

Everything is answered in the end, and the worker neither dies nor spins: waiting costs it next to nothing.
"""

import asyncio
import logging
import os
from pathlib import Path

import psutil
from answers import check_answers, envelopes
from broker_pairs import Pair, on
from outages import FAULTS, proxied
from pairs import QUIET
from worker_process import SlowWorker

from rejoinder.adapters import Message

REQUESTS = 150
LEASES = 1.2
SECONDS = 8.0
"""Of the outage, or `LEASES` where that is longer; REJOINDER_TEST_OUTAGE_SECONDS says otherwise."""
CPU_SHARE = 0.2
"""Of one core, while there is nothing to do but to wait for a broker."""
LINES_PER_SECOND = 20
"""What the log may say of it."""


@on("sqs", "pubsub")
async def test_an_outage_costs_nothing_but_time(pair: Pair, tmp_path: Path) -> None:
    """All kinds of it at once, each with a worker of its own: most of the time is waiting."""
    await asyncio.gather(*(outage(pair, fault, tmp_path / f"{fault}.log") for fault in FAULTS))


async def outage(pair: Pair, fault: str, log: Path) -> None:
    queues = await pair.queues()
    await queues.send(*envelopes(REQUESTS))
    got: list[Message] = []
    with proxied(pair) as (proxy, env), SlowWorker(queues, log, 0.1, env=env) as worker:
        await queues.receive(REQUESTS // 4, got=got)
        seconds = float(os.environ.get("REJOINDER_TEST_OUTAGE_SECONDS", max(SECONDS, LEASES * queues.lease)))
        process, lines = psutil.Process(worker.process.pid), len(worker.events())
        before = sum(process.cpu_times()[:2])
        FAULTS[fault](proxy)
        await asyncio.sleep(seconds)  # the outage itself, not a wait for anything
        used, said = sum(process.cpu_times()[:2]) - before, len(worker.events()) - lines
        proxy.restore()
        assert worker.process.poll() is None, log.read_text()
        await queues.receive(REQUESTS, got=got)
        assert await asyncio.to_thread(worker.stop) == 0, log.read_text()
    got += await queues.receive_some(QUIET)
    again = check_answers(got, range(REQUESTS))
    assert used < CPU_SHARE * seconds, f"{fault}: {used:.1f} s of processor time in {seconds:g} s"
    assert said < LINES_PER_SECOND * seconds, f"{fault}: {said} lines in {seconds:g} s"
    said_of_it = "%s of %g s: %.2f s of processor time, %d lines, %d answers again"
    logging.getLogger(__name__).info(said_of_it, fault, seconds, used, said, again)
