"""Sentences of `Subscription.ack`, `set_lease` and `backlog`."""

import asyncio
import time

import pytest
from conformance_bench import CLOCK, put
from needs import needs

from rejoinder.adapters import Backlog, LeaseLost


async def test_an_acked_message_is_never_delivered_again(bench):
    lease = bench.broker.short_lease
    subscription, topic = await bench.pair(lease)
    await put(topic, b"1", b"2")
    one, two = await bench.get(subscription, 2)
    assert await subscription.ack([one]) == [None]
    (again,) = await bench.get(subscription)  # the other's lease has run out by then, and so would this one's
    assert again.id == two.id
    await subscription.ack([again])
    assert await subscription.receive(1, lease * 1.5) == []


async def test_nothing_to_settle_is_settled(bench):
    subscription, _ = await bench.pair()
    assert await subscription.ack([]) == []
    assert await subscription.set_lease([], 5) == []


async def expired(bench, subscription, topic):
    """The only message, whose lease has ended, and which nobody has received again."""
    await put(topic, b"x")
    (message,) = await bench.get(subscription)
    if not bench.broker.tells_backlog:  # nothing but a receive would tell that it has ended
        await asyncio.sleep(1.5 * subscription.lease_seconds)
        return message

    async def ended():
        return (await subscription.backlog()).waiting == 1

    await bench.until(ended)
    return message


async def test_a_lease_that_ended_can_be_acked_while_nobody_else_has_it(bench):
    subscription, topic = await bench.pair(bench.broker.short_lease)
    message = await expired(bench, subscription, topic)
    (outcome,) = await subscription.ack([message])
    if not bench.broker.acks_late:
        assert isinstance(outcome, LeaseLost)
        assert [again.id for again in await bench.get(subscription)] == [message.id]
        return
    assert outcome is None
    assert await subscription.receive(1, 1.5 * bench.broker.short_lease) == []
    if bench.broker.tells_backlog:
        assert await subscription.backlog() == Backlog(0, 0, None)


@needs("renews_late")  # what SQS says to it: tests/adapters/test_aws_errors.py
async def test_a_lease_that_ended_can_be_renewed_while_nobody_else_has_it(bench):
    subscription, topic = await bench.pair(bench.broker.short_lease)
    message = await expired(bench, subscription, topic)
    assert await subscription.set_lease([message], 60) == [None]
    assert await bench.nothing(subscription)
    if bench.broker.tells_backlog:
        assert await subscription.backlog() == Backlog(0, 1, None)
    assert await subscription.ack([message]) == [None]


@needs("tells_lost")
@pytest.mark.parametrize("settle", ["ack", "renew", "nack"])
async def test_a_lease_that_passed_to_another_delivery_is_lost(bench, settle):
    subscription, topic = await bench.pair()
    await put(topic, b"x")
    (stale,) = await bench.get(subscription)
    assert await subscription.set_lease([stale], 0) == [None]
    (live,) = await bench.get(subscription)
    seconds = {"renew": 30, "nack": 0}
    (outcome,) = await (
        subscription.ack([stale]) if settle == "ack" else subscription.set_lease([stale], seconds[settle])
    )
    assert isinstance(outcome, LeaseLost)
    assert stale.id in str(outcome)
    assert await bench.nothing(subscription)  # the live lease was not touched
    assert await subscription.ack([live]) == [None]


@needs("tells_lost")
async def test_a_message_that_is_gone_is_lost(bench):
    subscription, topic = await bench.pair()
    await put(topic, b"x")
    (message,) = await bench.get(subscription)
    assert await subscription.ack([message]) == [None]
    for outcomes in (await subscription.ack([message]), await subscription.set_lease([message], 5)):
        assert isinstance(outcomes[0], LeaseLost)


@needs("tells_lost")
async def test_outcomes_are_in_order_and_one_failure_fails_no_other(bench):
    subscription, topic = await bench.pair()
    await put(topic, *(b"%d" % number for number in range(5)))
    messages = await bench.get(subscription, 5)
    await subscription.ack(messages[1:2])
    await subscription.ack(messages[3:4])
    lost = [False, True, False, True, False]
    outcomes = await subscription.set_lease(messages, 90)
    assert [isinstance(outcome, LeaseLost) for outcome in outcomes] == lost
    outcomes = await subscription.ack(messages)
    assert [isinstance(outcome, LeaseLost) for outcome in outcomes] == lost
    assert [outcome for outcome in outcomes if not isinstance(outcome, LeaseLost)] == [None] * 3


async def test_a_renewed_lease_holds_from_now(bench):
    lease = bench.broker.short_lease
    subscription, topic = await bench.pair(lease)
    await put(topic, b"x")
    (message,) = await bench.get(subscription)
    renewed = time.time()
    assert await subscription.set_lease([message], 3 * lease) == [None]
    (again,) = await bench.get(subscription)
    assert time.time() >= renewed + 3 * lease - CLOCK
    assert again.attempt == bench.attempt(2)


async def test_a_lease_can_be_made_shorter(bench):
    subscription, topic = await bench.pair(600)
    await put(topic, b"x")
    (message,) = await bench.get(subscription)
    receiving = asyncio.create_task(subscription.receive(1, bench.broker.patience))
    await asyncio.sleep(0)
    shortened = time.time()
    assert await subscription.set_lease([message], bench.broker.short_lease) == [None]
    (again,) = await receiving
    assert again.id == message.id
    assert time.time() >= shortened + bench.broker.short_lease - CLOCK


async def test_zero_makes_it_available_at_once_with_the_next_attempt(bench):
    subscription, topic = await bench.pair()
    await put(topic, b"x")
    for number in range(1, 5):
        (message,) = await bench.get(subscription)
        assert message.attempt == bench.attempt(number)
        # Renewing changes no attempt.
        assert await subscription.set_lease([message], 30) == [None]
        assert await subscription.set_lease([message], 30) == [None]
        assert message.attempt == bench.attempt(number)
        assert await subscription.set_lease([message], 0) == [None]


async def test_a_nack_wakes_a_waiting_receive(bench):
    queue = await bench.queue()
    subscription, topic = await bench.subscription(queue.subscription), await bench.topic(queue.topic)
    await put(topic, b"x")
    (message,) = await bench.get(subscription)
    other = await bench.subscription(queue.subscription)
    receiving = asyncio.create_task(other.receive(1, bench.broker.patience))
    await asyncio.sleep(0)
    await subscription.set_lease([message], 0)
    assert [again.id for again in await receiving] == [message.id]


async def test_seconds_out_of_range_are_refused(bench):
    subscription, topic = await bench.pair()
    await put(topic, b"x")
    (message,) = await bench.get(subscription)
    longest = subscription.max_lease_seconds
    for seconds in (-1, -0.001, longest + 1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="seconds"):
            await subscription.set_lease([message], seconds)
    assert await subscription.set_lease([message], longest) == [None]


@needs("tells_backlog")
async def test_backlog_counts_waiting_held_and_dead(bench):
    subscription, topic = await bench.pair(max_attempts=2)
    assert await subscription.backlog() == Backlog(0, 0, 0)
    await put(topic, *(b"%d" % number for number in range(10)))
    assert await subscription.backlog() == Backlog(10, 0, 0)
    messages = await bench.get(subscription, 4)
    assert await subscription.backlog() == Backlog(6, 4, 0)
    await subscription.set_lease(messages[:1], 30)  # delayed is held
    await subscription.set_lease(messages[1:2], 0)
    await subscription.ack(messages[2:3])
    assert await subscription.backlog() == Backlog(7, 2, 0)
    (last,) = [message for message in await bench.get(subscription, 7) if message.id == messages[1].id]
    await subscription.set_lease([last], 0)
    assert await subscription.backlog() == Backlog(0, 8, 1)


async def test_backlog_says_no_dead_without_a_policy(bench):
    subscription, _ = await bench.pair()
    assert (await subscription.backlog()).dead is None
    assert subscription.max_attempts is None
