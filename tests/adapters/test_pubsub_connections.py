"""Connections: one for each kind of traffic, noticed when they go silent, and none left behind."""

import asyncio
import gc
import socket

import psutil
import pubsub_resources
import pytest
from proxy import Proxy
from pubsub_service import SUBSCRIPTION, TOPIC

from rejoinder.adapters import Outgoing, Transient, open_subscription, open_topic, pubsub_pulls, pubsub_wire


def connections(port):
    """The process's connections to `port`."""
    return [
        one
        for one in psutil.Process().net_connections("tcp")
        if one.raddr and one.raddr.port == port and one.status == psutil.CONN_ESTABLISHED
    ]


def ends(port):
    """Our ends of them: those of an earlier test may go meanwhile."""
    return {one.laddr.port for one in connections(port)}


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def use(subscription_url, topic_url):
    """Open both ends and make every kind of call."""
    async with open_subscription(subscription_url) as subscription, open_topic(topic_url) as topic:
        await topic.publish([Outgoing(b"x")])
        messages = await subscription.receive(1, 60)
        assert await subscription.set_lease(messages, 30) == [None]
        assert await subscription.ack(messages) == [None]
        assert await subscription.receive(1, 0.01) == []
        waiting = asyncio.create_task(subscription.receive(1, 60))
        await asyncio.sleep(0)
        waiting.cancel()


async def test_receiving_settling_and_sending_each_have_their_connection(gcp):
    subscription_name, topic_name, _ = await pubsub_resources.make()
    port = int(gcp.rpartition(":")[2])
    before = ends(port)
    async with (
        open_subscription(f"gcppubsub://{subscription_name}") as subscription,
        open_topic(f"gcppubsub://{topic_name}") as topic,
    ):
        await topic.publish([Outgoing(b"x")])
        messages = await subscription.receive(1, 60)
        await subscription.ack(messages)
        assert len(ends(port) - before) == 3
    await until(lambda: ends(port) <= before)


async def test_waiting_pulls_hold_up_no_heartbeat(google):
    """More pulls wait than one connection carries at a time: leases are settled beside them."""
    async with open_subscription(f"gcppubsub://{SUBSCRIPTION}") as subscription:
        google.waiting.put_nowait(b"1")
        messages = await subscription.receive(1, 60)
        polls = [asyncio.create_task(subscription.receive(100, 60)) for _ in range(120)]  # more than one connection has
        await until(lambda: google.pulling >= 100)
        for _ in range(20):
            assert await subscription.set_lease(messages, 30) == [None]
        for poll in polls:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)


async def test_nothing_is_left_behind(gcp, monkeypatch):
    monkeypatch.setattr(pubsub_pulls, "LINGER_SECONDS", 0.5)
    # The emulator may give a message to a pull that was cancelled long ago: it comes back after a lease.
    subscription_name, topic_name, _ = await pubsub_resources.make(lease=1)
    urls = f"gcppubsub://{subscription_name}", f"gcppubsub://{topic_name}"
    process = psutil.Process()
    for _ in range(2):  # what gRPC sets up once for the process is there by then
        await use(*urls)
    gc.collect()
    tasks, files, threads = asyncio.all_tasks(), process.num_fds(), process.num_threads()
    for _ in range(6):
        await use(*urls)
    gc.collect()
    await until(lambda: process.num_fds() <= files)
    await until(lambda: process.num_threads() <= threads)
    await until(lambda: asyncio.all_tasks() <= tasks)


async def test_a_connection_that_goes_silent_is_noticed(google, monkeypatch):
    monkeypatch.setattr(pubsub_wire, "EMULATOR_KEEPALIVE", ("grpc.keepalive_time_ms", 1_000))
    quick = {"grpc.keepalive_timeout_ms": 1_000, "grpc.http2.ping_timeout_ms": 1_000}
    assert quick.keys() < dict(pubsub_wire.OPTIONS).keys()
    monkeypatch.setattr(pubsub_wire, "OPTIONS", (dict(pubsub_wire.OPTIONS) | quick).items())
    async with Proxy(google.address) as proxy:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", proxy.address)
        async with open_subscription(f"gcppubsub://{SUBSCRIPTION}") as subscription:
            receiving = asyncio.create_task(subscription.receive(1, 300))
            await until(lambda: google.pulling == 1)
            proxy.hang()
            async with asyncio.timeout(60):
                with pytest.raises(Transient):
                    await receiving
            proxy.restore()
            await until(lambda: google.pulling == 0)  # our service would give the message to the silent one
            google.waiting.put_nowait(b"1")
            await patiently(lambda: subscription.receive(1, 5), "the connection is not made again")


async def patiently(call, otherwise):
    async with asyncio.timeout(60):
        while True:
            try:
                if got := await call():
                    return got
            except Transient:
                await asyncio.sleep(0.05)
    raise AssertionError(otherwise)


async def test_an_outage_is_over_when_the_broker_is_back(google, monkeypatch):
    async with Proxy(google.address) as proxy:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", proxy.address)
        async with (
            open_subscription(f"gcppubsub://{SUBSCRIPTION}") as subscription,
            open_topic(f"gcppubsub://{TOPIC}") as topic,
        ):
            google.waiting.put_nowait(b"1")
            messages = await subscription.receive(1, 60)
            receiving = asyncio.create_task(subscription.receive(1, 300))
            await until(lambda: google.pulling == 1)
            proxy.cut()
            with pytest.raises(Transient):
                await receiving
            (outcome,) = await subscription.ack(messages)
            assert isinstance(outcome, Transient)
            (outcome,) = await topic.publish([Outgoing(b"x")])
            assert isinstance(outcome, Transient)
            with pytest.raises(Transient):
                await subscription.backlog()
            proxy.restore()
            google.waiting.put_nowait(b"2")
            (message,) = await patiently(lambda: subscription.receive(1, 5), "nothing is received")
            assert message.body == b"2"
            await patiently(subscription.backlog, "settling is not connected again")


async def test_nobody_listens_there(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", f"127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(Transient, match="UNAVAILABLE"):
            async with open_subscription(f"gcppubsub://{SUBSCRIPTION}"):
                pass


async def test_bytes_that_are_no_answer_are_transient(google):
    async def garbage(_request):
        google.info = Garbage()

    google.hooks["GetSubscription"] = garbage
    with pytest.raises(Transient, match="cannot be read"):
        async with open_subscription(f"gcppubsub://{SUBSCRIPTION}"):
            pass


class Garbage:
    def SerializeToString(self):  # noqa: N802
        return b"\xff\xff\xff"
