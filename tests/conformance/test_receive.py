"""Sentences of `driver.Message`, `Outgoing` and `Subscription.receive`."""

import asyncio
import dataclasses
import time

import pytest
from conformance_bench import CLOCK, put
from needs import needs

from rejoinder.adapters import Message, Outgoing


async def test_a_message_is_frozen(bench):
    subscription, topic = await bench.pair()
    await put(topic, b"x")
    (message,) = await bench.get(subscription)
    assert isinstance(message, Message)
    with pytest.raises(dataclasses.FrozenInstanceError):
        message.body = b"y"


async def test_body_and_attributes_arrive_unchanged(bench):
    subscription, topic = await bench.pair()
    sent = [
        Outgoing(b"", {} if bench.broker.carries_empty else {"a": "b"}),
        Outgoing(bytes(range(256)), {"k": "v", "k.2-x_y": "é\n\"\\'", "empty-ish": " "}),
        Outgoing(b"\0" * 100_000, {"n": "1"}, ordering_key="one"),
    ]
    outcomes = await topic.publish(sent)
    assert all(isinstance(outcome, str) for outcome in outcomes)
    got = {message.id: message for message in await bench.get(subscription, 3)}
    for outgoing, message_id in zip(sent, outcomes, strict=True):
        assert got[message_id].body == outgoing.body
        assert dict(got[message_id].attributes) == dict(outgoing.attributes)


async def test_the_sender_may_change_its_attributes_after_publishing(bench):
    subscription, topic = await bench.pair()
    attributes = {"k": "before"}
    await topic.publish([Outgoing(b"x", attributes)])
    attributes["k"] = "after"
    (message,) = await bench.get(subscription)
    assert dict(message.attributes) == {"k": "before"}


async def test_ids_are_unique_for_ever(bench):
    subscription, topic = await bench.pair()
    seen: set[str] = set()
    for _ in range(3):
        ids = await put(topic, b"x", b"x")
        assert len(set(ids)) == 2
        assert not seen & set(ids)
        seen |= set(ids)
        got = await bench.get(subscription, 2)
        assert {message.id for message in got} == set(ids)
        assert await subscription.ack(got) == [None, None]


async def test_sent_at_is_when_the_broker_took_it(bench):
    subscription, topic = await bench.pair()
    before = time.time()
    await put(topic, b"x")
    after = time.time()
    (message,) = await bench.get(subscription)
    if bench.broker.relays:
        after = time.time()
    if bench.broker.says_sent_at:
        assert message.sent_at is not None
        assert before - CLOCK <= message.sent_at <= after + CLOCK
    else:
        assert message.sent_at is None


async def test_limit_is_kept(bench):
    subscription, topic = await bench.pair()
    await put(topic, *(b"%d" % number for number in range(10)))
    got = await subscription.receive(3, bench.broker.patience)
    assert 1 <= len(got) <= 3
    rest = await bench.get(subscription, 10 - len(got))
    assert len({message.id for message in got + rest}) == 10


@pytest.mark.parametrize("limit", [0, -1])
async def test_a_limit_below_one_is_refused(bench, limit):
    subscription, _ = await bench.pair()
    with pytest.raises(ValueError, match="limit"):
        await subscription.receive(limit, 0)


@needs("keeps_order")
async def test_oldest_available_first(bench):
    subscription, topic = await bench.pair()
    bodies = [b"%d" % number for number in range(50)]
    await put(topic, *bodies[:20])
    await put(topic, *bodies[20:])
    first = await bench.get(subscription, 10)
    assert [message.body for message in first] == bodies[:10]
    # What is let go is the oldest again.
    await subscription.set_lease(first[5:7], 0)
    rest = await bench.get(subscription, 42)
    assert [message.body for message in rest] == bodies[5:7] + bodies[10:]


async def test_returns_as_soon_as_there_is_any_message(bench):
    subscription, topic = await bench.pair()
    started = time.monotonic()
    receiving = asyncio.create_task(subscription.receive(100, 600))
    await asyncio.sleep(0)
    (sent,) = await put(topic, b"x")
    (message,) = await receiving
    assert message.id == sent
    assert time.monotonic() - started < 300


async def test_an_empty_list_after_wait_seconds(bench):
    subscription, _ = await bench.pair()
    started = time.monotonic()
    assert await subscription.receive(5, 0.15) == []
    assert time.monotonic() - started >= 0.15 - CLOCK
    assert await subscription.receive(5, 0) == []


async def test_a_leased_message_is_received_by_nobody_else(bench):
    queue = await bench.queue()
    one, other = await bench.subscription(queue.subscription), await bench.subscription(queue.subscription)
    topic = await bench.topic(queue.topic)
    await put(topic, *(b"%d" % number for number in range(40)))
    receives = await asyncio.gather(*(subscription.receive(10, 1) for subscription in (one, other) * 4))
    got = [message.id for messages in receives for message in messages]
    assert len(got) == len(set(got))
    assert await bench.nothing(one) == (len(got) == 40)


async def test_a_lease_that_ends_brings_the_message_back(bench):
    lease = bench.broker.short_lease
    subscription, topic = await bench.pair(lease)
    assert subscription.lease_seconds == lease
    await topic.publish([Outgoing(b"body", {"a": "b"})])
    previous, leased = None, 0.0
    for number in range(1, 4):
        before = time.time()
        (message,) = await bench.get(subscription)
        assert message.attempt == bench.attempt(number)
        if previous is not None:
            assert time.time() >= leased + lease - CLOCK
            assert message is not previous
            assert (message.id, message.body, dict(message.attributes)) == (previous.id, b"body", {"a": "b"})
        leased, previous = before, message


@needs("buries")
async def test_after_max_attempts_a_message_moves_to_the_dead_letter_queue(bench):
    most = max(2, bench.broker.least_attempts)
    queue = await bench.queue(max_attempts=most)
    subscription, topic = await bench.subscription(queue.subscription), await bench.topic(queue.topic)
    assert queue.dead_letter is not None
    dead = await bench.subscription(queue.dead_letter)
    assert subscription.max_attempts == most
    assert dead.max_attempts is None
    await topic.publish([Outgoing(b"poison", {"a": "b"}), Outgoing(b"good")])
    for number in range(1, most + 1):
        got = await bench.get(subscription, 2 if number == 1 else 1)
        assert {message.attempt for message in got} == {bench.attempt(number, policy=True)}
        good = [message for message in got if message.body == b"good"]
        assert await subscription.ack(good) == [None] * len(good)
        (poison,) = [message for message in got if message.body == b"poison"]
        # The last delivery's lease runs out, the others are nacked.
        seconds = 0 if number < most else bench.broker.short_lease
        assert await subscription.set_lease([poison], seconds) == [None]

    async def moved():
        return await subscription.receive(1, 0.05) == [] and bool(corpses.extend(await dead.receive(1, 0)) or corpses)

    corpses: list[Message] = []
    await bench.until(moved)
    assert (corpses[0].body, corpses[0].attributes["a"]) == (b"poison", "b")
    assert corpses[0].attempt == bench.attempt(1 if bench.broker.dead_count_afresh else most + 1)


@needs("buries")
async def test_a_nack_of_the_last_attempt_moves_it_too(bench):
    queue = await bench.queue(max_attempts=bench.broker.least_attempts)
    subscription, topic = await bench.subscription(queue.subscription), await bench.topic(queue.topic)
    assert queue.dead_letter is not None
    dead = await bench.subscription(queue.dead_letter)
    (sent,) = await put(topic, b"poison")
    message = await bench.last_attempt(subscription)
    assert await subscription.set_lease([message], 0) == [None]
    assert await bench.nothing(subscription)
    (corpse,) = await bench.get(dead)
    assert corpse.body == b"poison"
    if bench.broker.tells_lost:
        (outcome,) = await subscription.ack([message])
        assert outcome is not None
        assert await bench.nothing(dead)
    assert sent == message.id


async def test_cancelling_a_waiting_receive_loses_nothing(bench):
    subscription, topic = await bench.pair()
    for steps in range(40):
        receiving = asyncio.create_task(subscription.receive(10, 600))
        for _ in range(steps % 8):
            await asyncio.sleep(0)
        publishing = asyncio.create_task(put(topic, b"x"))
        for _ in range(steps):
            await asyncio.sleep(0 if steps % 2 else 0.0002)
        receiving.cancel()
        (sent,) = await publishing
        got = await asyncio.gather(receiving, return_exceptions=True)
        messages = await bench.get(subscription) if isinstance(got[0], BaseException) else got[0]
        assert [message.id for message in messages] == [sent]
        assert await subscription.ack(messages) == [None]


async def test_cancelling_a_receive_with_a_backlog_loses_nothing(bench):
    subscription, topic = await bench.pair()
    ids = set(await put(topic, *(b"%d" % number for number in range(30))))
    for steps in range(30):
        receiving = asyncio.create_task(subscription.receive(30, 600))
        for _ in range(steps):
            await asyncio.sleep(0 if steps % 2 else 0.0002)
        receiving.cancel()
        (got,) = await asyncio.gather(receiving, return_exceptions=True)
        if not isinstance(got, BaseException):
            assert await subscription.set_lease(got, 0) == [None] * len(got)
    assert {message.id for message in await bench.get(subscription, 30)} == ids
