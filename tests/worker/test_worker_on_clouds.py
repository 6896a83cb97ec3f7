"""The worker on the brokers that it is made for: order, several receives, deliveries that are not counted."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import aws_resources
import pubsub_resources
import pytest
from worker_harness import LIMIT, GateEngine

from rejoinder.adapters import Message, Outgoing, Subscription, Topic, open_subscription, open_topic
from rejoinder.worker.engines.echo import EchoEngine
from rejoinder.worker.errors import Failed, Unavailable
from rejoinder.worker.service import StopSignals, serve
from rejoinder.worker.settings import Settings

Got = list[tuple[dict[str, Any], Message]]


async def queue(*, fifo: bool = False) -> str:
    arn, _ = await aws_resources.make_queue(fifo=fifo, VisibilityTimeout=10)
    return f"awssqs:///{aws_resources.name_of(arn)}"


async def pubsub(**settings: Any) -> tuple[str, str]:
    subscription, topic, _ = await pubsub_resources.make(**settings)
    return f"gcppubsub://{subscription}", f"gcppubsub://{topic}"


def request(body: Any) -> bytes:
    return json.dumps({"path": "/run", "metadata": {"n": body}, "body": body}).encode()


@contextlib.asynccontextmanager
async def working(requests: str, responses: str, engine: Any, **settings: Any) -> AsyncIterator[None]:
    signals = StopSignals()
    task = asyncio.create_task(
        serve(Settings(requests=requests, responses=responses, engine="echo", **settings), signals, engine)
    )
    try:
        yield
    finally:
        signals.receive("SIGTERM")
        await asyncio.wait_for(task, LIMIT)


async def gather(subscription: Subscription, count: int) -> Got:
    got: Got = []
    async with asyncio.timeout(120):
        while len(got) < count:
            messages = await subscription.receive(subscription.max_receive, 1)
            if messages:
                assert await subscription.ack(messages) == [None] * len(messages)
            got += [(json.loads(message.body), message) for message in messages]
    return got


async def send(topic: Topic, batch: list[Outgoing]) -> None:
    outcomes = await topic.publish(batch)
    assert all(isinstance(outcome, str) for outcome in outcomes), outcomes


def in_order(got: Got, keys: int, each: int) -> None:
    for key in range(keys):
        numbers = [response["metadata"]["n"] for response, message in got if message.ordering_key == f"key{key}"]
        assert numbers == [f"{key}/{n}" for n in range(each)]


@pytest.mark.usefixtures("aws")
async def test_a_fifo_queue_keeps_its_order_whatever_fails() -> None:
    requests, responses = await queue(fifo=True), await queue(fifo=True)
    engine = GateEngine(capacity=4)
    engine.open = True
    engine.errors = {"0/2": [Unavailable("busy")], "1/0": [Failed("odd"), Unavailable("busy")]}
    async with open_topic(requests) as topic, open_subscription(responses) as subscription:
        await send(topic, [Outgoing(request(f"{k}/{n}"), ordering_key=f"key{k}") for n in range(6) for k in range(3)])
        async with working(requests, responses, engine, retry_delay_seconds=0.5):
            in_order(await gather(subscription, 18), 3, 6)
    assert len(engine.started) == 18 + 3


@pytest.mark.usefixtures("aws")
async def test_more_room_than_one_receive_brings_is_filled() -> None:
    requests, responses = await queue(), await queue()
    engine = GateEngine(capacity=60)
    async with open_topic(requests) as topic, open_subscription(responses) as subscription:
        await send(topic, [Outgoing(request(n)) for n in range(200)])
        async with working(requests, responses, engine, prefetch=0):
            async with asyncio.timeout(LIMIT):
                while len(engine.running) < 60:
                    await asyncio.sleep(0.005)
            engine.open = True
            for body in list(engine.started):
                engine.release(body)
            got = await gather(subscription, 200)
    assert sorted(response["metadata"]["n"] for response, _ in got) == list(range(200))
    assert {message.attributes["attempt"] for _, message in got} == {"1"}


@pytest.mark.usefixtures("gcp")
async def test_pubsub_keeps_its_order() -> None:
    """Without failures: the emulator does not keep the order of what comes back."""
    requests, request_topic = await pubsub(enable_message_ordering=True)
    responses, response_topic = await pubsub(enable_message_ordering=True)
    async with open_topic(request_topic) as topic, open_subscription(responses) as subscription:
        await send(topic, [Outgoing(request(f"{k}/{n}"), ordering_key=f"key{k}") for n in range(20) for k in range(3)])
        async with working(requests, response_topic, EchoEngine("/run")):
            in_order(await gather(subscription, 60), 3, 20)


@pytest.mark.usefixtures("gcp")
async def test_what_always_fails_is_answered_though_nobody_counts() -> None:
    requests, request_topic = await pubsub()
    responses, response_topic = await pubsub()
    engine = GateEngine()
    engine.open = True
    engine.errors = {"bad": [Failed("odd") for _ in range(10)]}
    async with open_topic(request_topic) as topic, open_subscription(responses) as subscription:
        await send(topic, [Outgoing(request("bad"))])
        async with working(requests, response_topic, engine, max_attempts=3, retry_delay_seconds=0.2):
            ((response, message),) = await gather(subscription, 1)
    assert (response["status_code"], engine.started) == (500, ["bad"] * 3)
    assert "attempt" not in message.attributes
