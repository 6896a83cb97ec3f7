"""Sentences of `Topic`, of opening and closing, and of the contract's opening paragraph."""

import asyncio
import collections

import pytest
from conformance_bench import put
from needs import needs

from rejoinder.adapters import Outgoing, TooLarge, open_subscription, open_topic


async def test_one_id_for_each_in_order(bench):
    subscription, topic = await bench.pair()
    ids = await put(topic, b"a", b"b", b"c")
    got = {message.id: message.body for message in await bench.get(subscription, 3)}
    assert [got[one] for one in ids] == [b"a", b"b", b"c"]


async def test_an_empty_batch_is_published(bench):
    _, topic = await bench.pair()
    assert await topic.publish([]) == []


async def test_too_large_fails_alone(bench):
    subscription, topic = await bench.pair()
    outcomes = await topic.publish(
        [Outgoing(b"1"), Outgoing(bench.broker.filler * (topic.max_body + 1)), Outgoing(b"3")]
    )
    assert isinstance(outcomes[1], TooLarge)
    got = {message.id: message.body for message in await bench.get(subscription, 2)}
    assert [got[outcomes[0]], got[outcomes[2]]] == [b"1", b"3"]
    (only,) = await topic.publish([Outgoing(bench.broker.filler * (topic.max_body + 1))])
    assert isinstance(only, TooLarge)
    assert await bench.nothing(subscription)


async def test_a_pointer_is_carried_or_refused_with_a_reason(bench):
    subscription, topic = await bench.pair()
    pointer = Outgoing(b"", {"a": "b"}, stored_at="s3://bucket/some key/é+%2F", stored_size=3_000_000)
    if not bench.broker.carries_pointers:
        with pytest.raises(ValueError, match=r"only awssqs:// carries .*stored_at"):
            await topic.publish([Outgoing(b"1"), pointer])
        assert await bench.nothing(subscription)
        return
    await put(topic, b"1")
    assert [isinstance(outcome, str) for outcome in await topic.publish([pointer])] == [True]
    whole, pointed = sorted(await bench.get(subscription, 2), key=lambda message: message.body, reverse=True)
    assert (whole.body, whole.stored_at) == (b"1", None)
    assert (pointed.body, pointed.stored_at, dict(pointed.attributes)) == (b"", pointer.stored_at, {"a": "b"})


async def test_the_largest_body_is_taken(bench):
    subscription, topic = await bench.pair()
    await put(topic, bench.broker.filler * topic.max_body)
    (message,) = await bench.get(subscription)
    assert len(message.body) == topic.max_body


@needs("orders_keys")
async def test_messages_of_one_ordering_key_keep_the_order_of_publishing(bench):
    subscription, topic = await bench.pair()
    for first in range(0, 30, 6):
        batch = [Outgoing(b"%d" % number, ordering_key=f"key{number % 2}") for number in range(first, first + 6)]
        assert all(isinstance(outcome, str) for outcome in await topic.publish(batch))
    got: list[int] = []
    while len(got) < 30:
        messages = await bench.get(subscription)
        assert await subscription.ack(messages) == [None]
        got += [int(message.body) for message in messages]
    for remainder in (0, 1):
        assert [number for number in got if number % 2 == remainder] == list(range(remainder, 30, 2))


async def test_a_message_outlives_those_who_opened_the_queue(bench):
    queue = await bench.queue()
    async with open_topic(queue.topic) as topic:
        (sent,) = await put(topic, b"x")
    async with open_subscription(queue.subscription) as subscription:
        (message,) = await bench.get(subscription)
        assert (message.id, message.body) == (sent, b"x")
        assert await subscription.set_lease([message], 0) == [None]
    async with open_subscription(queue.subscription) as subscription:
        (message,) = await bench.get(subscription)
        assert (message.id, message.attempt) == (sent, bench.attempt(2))


async def test_the_name_is_the_same_for_every_spelling(bench):
    queue = await bench.queue(max_attempts=5)
    one, other = await bench.subscription(queue.subscription), await bench.subscription(queue.respelled)
    topic = await bench.topic(queue.topic)
    assert one.name == other.name
    assert one.name
    assert queue.dead_letter is not None
    assert (await bench.subscription(queue.dead_letter)).name != one.name
    assert topic.name
    again = await bench.topic(queue.topic)
    assert topic.name == again.name


async def test_all_methods_at_once_from_many_tasks(bench):
    subscription, topic = await bench.pair()
    counts: collections.Counter[str] = collections.Counter()
    published: set[str] = set()

    async def publisher(number):
        for one in range(25):
            published.update(await put(topic, b"%d-%d" % (number, one)))

    async def consumer():
        while counts.total() < 200:
            messages = await subscription.receive(7, 0.02)
            assert await subscription.set_lease(messages, 60) == [None] * len(messages)
            await subscription.backlog()
            assert await subscription.ack(messages) == [None] * len(messages)
            counts.update(message.id for message in messages)

    async with asyncio.timeout(bench.broker.patience), asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(publisher(number))
            group.create_task(consumer())
    assert set(counts) == published
    assert set(counts.values()) == {1}


async def test_no_call_blocks_the_event_loop(bench):
    subscription, topic = await bench.pair()
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    ticking = asyncio.create_task(tick())
    receiving = asyncio.create_task(subscription.receive(1, 2))
    assert await receiving == []
    # Counted, not timed: a loop that was blocked for the 2 s would have had two or three ticks.
    assert ticks > 10
    await put(topic, b"x")
    ticking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ticking
