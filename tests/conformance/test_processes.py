"""The same sentences between processes, some of which are killed."""

import asyncio
import json
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from conformance_bench import CLOCK, put
from needs import needs

from rejoinder.adapters import Message

pytestmark = needs("across_processes")


@asynccontextmanager
async def peer(role, url):
    """Run `peer.py`; kill it with SIGKILL at the end, if it still runs."""
    script = str(Path(__file__).with_name("peer.py"))
    process = await asyncio.create_subprocess_exec(sys.executable, script, role, url, stdout=asyncio.subprocess.PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def line(process):
    async with asyncio.timeout(120):
        return json.loads(await process.stdout.readline())


async def test_consumers_in_several_processes_share_without_overlap(bench):
    queue = await bench.queue()
    subscription, topic = await bench.subscription(queue.subscription), await bench.topic(queue.topic)
    consumed: list[str] = []
    async with (
        peer("consume", queue.subscription) as one,
        peer("consume", queue.subscription) as two,
        peer("consume", queue.subscription) as three,
    ):
        # Published one batch at a time, so that the consumers contend for few messages.
        published: list[str] = []
        for _ in range(60):
            published += await put(topic, *[b"x"] * 10)

        async def read(process):
            while len(consumed) < len(published):
                event = await line(process)
                assert event["lost"] == 0
                consumed.extend(event["ids"])

        readers = [asyncio.create_task(read(process)) for process in (one, two, three)]
        done, pending = await asyncio.wait(readers, timeout=250, return_when=asyncio.FIRST_COMPLETED)
        for reader in pending:
            reader.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for reader in done:
            reader.result()
    assert len(consumed) == len(set(consumed))
    assert set(consumed) == set(published)
    assert await bench.nothing(subscription)


async def test_another_process_is_heard_while_waiting(bench):
    queue = await bench.queue()
    subscription = await bench.subscription(queue.subscription)
    receiving = asyncio.create_task(subscription.receive(1, 60))
    async with peer("publish", queue.topic) as publisher:
        event = await line(publisher)
        (message,) = await receiving
        if bench.broker.keeps_order:
            assert message.id == event["ids"][0]
        while message.id not in event["ids"]:
            event = await line(publisher)


async def test_a_killed_holder_loses_its_lease_and_not_the_message(bench):
    lease = max(1.0, bench.broker.short_lease)
    queue = await bench.queue(lease)
    subscription, topic = await bench.subscription(queue.subscription), await bench.topic(queue.topic)
    (sent,) = await put(topic, b"x")
    async with peer("hold", queue.subscription) as holder:
        held = await line(holder)
        assert (held["id"], held["attempt"]) == (sent, bench.attempt(1))
    (message,) = await bench.get(subscription)  # killed by now
    assert (message.id, message.attempt, message.body) == (sent, bench.attempt(2), b"x")
    assert time.time() >= held["before"] + lease - CLOCK


@needs("buries")
async def test_a_killed_holder_of_the_last_attempt_leaves_a_dead_letter(bench):
    queue = await bench.queue(max(3.0, bench.broker.short_lease), max_attempts=bench.broker.least_attempts)
    subscription, topic = await bench.subscription(queue.subscription), await bench.topic(queue.topic)
    assert queue.dead_letter is not None
    dead = await bench.subscription(queue.dead_letter)
    (sent,) = await put(topic, b"x")
    for _ in range(bench.broker.least_attempts - 1):
        assert await subscription.set_lease(await bench.get(subscription), 0) == [None]
    async with peer("hold", queue.subscription) as holder:
        assert (await line(holder))["id"] == sent

    async def moved():
        # Some brokers move it only when somebody asks for it again.
        return await subscription.receive(1, 0) == [] and bool(corpses.extend(await dead.receive(1, 0)) or corpses)

    corpses: list[Message] = []
    await bench.until(moved)
    assert corpses[0].body == b"x"


@pytest.mark.parametrize("events", [1, 20, 60])
async def test_a_killed_publisher_loses_no_id_that_it_was_given(bench, events):
    queue = await bench.queue()
    printed: list[str] = []
    async with peer("publish", queue.topic) as publisher:
        for _ in range(events):
            printed += (await line(publisher))["ids"]
        publisher.kill()
        rest, _ = await publisher.communicate()
    for text in rest.decode().splitlines(keepends=True):
        if text.endswith("\n"):  # the last one may be cut off
            printed += json.loads(text)["ids"]
    subscription = await bench.subscription(queue.subscription)
    assert len(printed) >= 5 * events
    received: set[str] = set()

    async def all_came():
        messages = await subscription.receive(1000, 1)  # what a topic relays comes a moment later
        received.update(message.id for message in messages)
        await subscription.ack(messages)
        return set(printed) <= received

    await bench.until(all_came)
