"""Pulls outlive the receive that started them: what becomes of them, and of what they bring."""

import asyncio
import time

import grpc
import pytest
from pubsub_service import SUBSCRIPTION, Refusal

from rejoinder.adapters import Transient, open_subscription, pubsub_pulls

URL = f"gcppubsub://{SUBSCRIPTION}"


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.002)


async def test_the_next_receive_takes_over_a_pull_that_goes_on(google):
    async with open_subscription(URL) as subscription:
        for _ in range(5):
            assert await subscription.receive(10, 0.05) == []
        await until(lambda: google.requests("Pull"))
        assert len(google.requests("Pull")) == 1
        google.waiting.put_nowait(b"1")
        (message,) = await subscription.receive(10, 60)
        assert message.body == b"1"
        assert len(google.requests("Pull")) == 1
        assert google.deliveries == 1


async def test_what_comes_between_two_receives_is_kept_for_the_second(google):
    async with open_subscription(URL) as subscription:
        assert await subscription.receive(10, 0.05) == []
        google.waiting.put_nowait(b"1")
        await until(subscription._pulls._parked[0].task.done)
        (message,) = await subscription.receive(10, 0)
        assert message.body == b"1"
        assert google.deliveries == 1


async def test_what_nobody_asks_for_is_let_go(google, monkeypatch):
    monkeypatch.setattr(pubsub_pulls, "LINGER_SECONDS", 0.3)
    async with open_subscription(URL) as subscription:
        assert await subscription.receive(10, 0.05) == []
        google.waiting.put_nowait(b"1")
        await until(lambda: google.deliveries == 1)
        await until(lambda: google.requests("ModifyAckDeadline"))
        assert not google.held
        (message,) = await subscription.receive(10, 60)
        assert message.body == b"1"


async def test_a_pull_that_nobody_takes_over_ends(google, monkeypatch):
    monkeypatch.setattr(pubsub_pulls, "LINGER_SECONDS", 0.1)
    async with open_subscription(URL) as subscription:
        assert await subscription.receive(10, 0.05) == []
        await until(lambda: google.requests("Pull"))
        await until(lambda: google.pulling == 0)


async def test_a_smaller_receive_takes_over_a_larger_pull_in_parts(google):
    async with open_subscription(URL) as subscription:
        assert await subscription.receive(10, 0.05) == []
        for body in (b"1", b"2", b"3", b"4"):
            google.waiting.put_nowait(body)
        got = [[message.body for message in await subscription.receive(limit, 60)] for limit in (1, 2, 10)]
        assert got == [[b"1"], [b"2", b"3"], [b"4"]]
        assert google.deliveries == 4
        assert not google.requests("ModifyAckDeadline")


async def test_a_part_that_nobody_asks_for_is_let_go(google):
    async with open_subscription(URL) as subscription:
        assert await subscription.receive(10, 0.05) == []
        for body in (b"1", b"2", b"3"):
            google.waiting.put_nowait(body)
        (message,) = await subscription.receive(1, 60)
        assert message.body == b"1"
    assert list(google.held) == [message.lease]
    assert google.waiting.qsize() == 2


async def test_the_rest_of_a_pull_is_kept_no_longer_than_its_leases_bear(google):
    """However often a part of it is taken: it is one pull's, and all its leases began when that was answered."""
    async with open_subscription(URL) as subscription:
        subscription._pulls.keep_seconds = 0.3
        assert await subscription.receive(10, 0.05) == []
        for number in range(10):
            google.waiting.put_nowait(b"%d" % number)
        await until(lambda: google.deliveries == 10)
        for _ in range(9):
            await subscription.receive(1, 5)
            await asyncio.sleep(0.1)
        await until(lambda: google.requests("ModifyAckDeadline"))
        request = google.requests("ModifyAckDeadline")[0]
        assert request.ack_deadline_seconds == 0
        assert "ack-10" in request.ack_ids


async def test_what_was_kept_while_the_process_stood_still_is_not_given_out(google):
    async with open_subscription(URL) as subscription:
        subscription._pulls.keep_seconds = 0.2
        assert await subscription.receive(10, 0.05) == []
        google.waiting.put_nowait(b"1")
        await until(subscription._pulls._parked[0].task.done)
        time.sleep(0.3)  # nothing runs meanwhile, the timers neither
        (message,) = await subscription.receive(10, 60)
        assert (message.body, message.lease) == (b"1", "ack-2")


async def test_what_came_first_is_given_out_first(google):
    """Of two pulls that nobody waits for, whichever was left first."""
    held = asyncio.Event()

    async def hook(request):
        if request.max_messages == 10:
            await held.wait()

    google.hooks["Pull"] = hook
    async with open_subscription(URL) as subscription:
        await asyncio.gather(*(subscription.receive(limit, 0.05) for limit in (10, 20)))
        google.waiting.put_nowait(b"1")
        await until(subscription._pulls._parked[1].task.done)
        google.waiting.put_nowait(b"2")
        held.set()
        await until(subscription._pulls._parked[0].task.done)
        assert [(await subscription.receive(30, 60))[0].body for _ in range(2)] == [b"1", b"2"]


async def slow(google, subscription):
    """Start a receive whose answer is on its way but not here; gives it and the event that lets the answer come."""
    answer = asyncio.Event()

    async def hook(_request):
        await answer.wait()

    google.hooks["Pull"] = hook
    google.waiting.put_nowait(b"1")
    receiving = asyncio.create_task(subscription.receive(10, 60))
    await until(lambda: google.requests("Pull"))
    return receiving, answer


async def cancel(task):
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_a_cancelled_receive_is_brought_is_let_go_at_once(google):
    async with open_subscription(URL) as subscription:
        receiving, answer = await slow(google, subscription)
        await cancel(receiving)
        answer.set()
        await until(lambda: google.requests("ModifyAckDeadline"))
        assert google.deliveries == 1
        assert not google.held
        assert [request.ack_deadline_seconds for request in google.requests("ModifyAckDeadline")] == [0]


async def test_closing_waits_for_what_a_cancelled_receive_is_brought(google):
    async with open_subscription(URL) as subscription:
        receiving, answer = await slow(google, subscription)
        await cancel(receiving)
        asyncio.get_running_loop().call_later(0.1, answer.set)
    assert google.deliveries == 1
    assert not google.held
    assert not google.waiting.empty()


async def test_closing_does_not_wait_for_ever(google, monkeypatch):
    monkeypatch.setattr(pubsub_pulls, "LINGER_SECONDS", 0.1)
    async with asyncio.timeout(20):
        async with open_subscription(URL) as subscription:
            receiving, answer = await slow(google, subscription)
            await cancel(receiving)
    assert not answer.is_set()
    assert google.deliveries == 0


async def test_an_error_of_a_pull_is_the_receives(google):
    async def hook(_request):
        raise Refusal(grpc.StatusCode.UNAVAILABLE, "come back later")

    google.hooks["Pull"] = hook
    async with open_subscription(URL) as subscription:
        for wait in (0, 5):
            with pytest.raises(Transient, match="come back later"):
                await subscription.receive(1, wait)


async def test_a_poll_that_ends_without_an_answer_is_followed_by_another(google, monkeypatch):
    monkeypatch.setattr(pubsub_pulls, "POLL_SECONDS", 0.1)
    async with open_subscription(URL) as subscription:
        receiving = asyncio.create_task(subscription.receive(10, 60))
        await until(lambda: len(google.requests("Pull")) >= 3)
        google.waiting.put_nowait(b"1")
        (message,) = await receiving
        assert message.body == b"1"


async def test_a_service_that_answers_empty_is_asked_again(google):
    async def hook(request):
        request.return_immediately = True  # the real one gives up after 90 s

    google.hooks["Pull"] = hook
    async with open_subscription(URL) as subscription:
        started = time.monotonic()
        assert await subscription.receive(10, 3) == []
        assert time.monotonic() - started >= 2.99
        assert 1 < len(google.requests("Pull")) <= 31  # and not as often as it answers


async def test_no_answer_to_a_pull_that_does_not_wait_is_an_error(google, monkeypatch):
    monkeypatch.setattr(pubsub_pulls, "IMMEDIATE_SECONDS", 0.2)
    async with open_subscription(URL) as subscription:

        async def hook(_request):
            await asyncio.sleep(60)

        google.hooks["Pull"] = hook
        with pytest.raises(Transient, match="Deadline"):
            await subscription.receive(1, 0)


async def test_limits_and_waits_are_sent_as_asked(google):
    async with open_subscription(URL) as subscription:
        assert subscription.max_receive == 100
        await subscription.receive(1000, 0)
        await subscription.receive(3, 0)
    requests = google.requests("Pull")
    assert [(request.max_messages, request.return_immediately) for request in requests] == [(100, True), (3, True)]


async def test_where_order_is_kept_one_pull_at_a_time_brings_messages(google):
    google.info.enable_message_ordering = True
    async with open_subscription(URL) as subscription:
        receives = [asyncio.create_task(subscription.receive(1, 20)) for _ in range(3)]
        for body in (b"1", b"2", b"3"):
            await until(lambda: google.pulling)
            assert google.pulling == 1
            google.waiting.put_nowait(body)
            (message,) = await receives.pop(0)
            assert message.body == body
        waiting = asyncio.create_task(subscription.receive(1, 20))
        await until(lambda: google.pulling)
        assert await subscription.receive(1, 0) == []
        assert await subscription.receive(1, 0.05) == []
        waiting.cancel()
        await asyncio.wait({waiting})
        google.waiting.put_nowait(b"4")
        (message,) = await subscription.receive(1, 20)
        assert message.body == b"4"
