"""Settling: whole seconds, requests of a size that the service takes, and each ack id's own outcome."""

import itertools

import grpc
import pytest
from pubsub_service import SUBSCRIPTION, Refusal

from rejoinder.adapters import Denied, LeaseLost, Message, Transient, open_subscription
from rejoinder.adapters import pubsub_subscription as module

URL = f"gcppubsub://{SUBSCRIPTION}"


async def received(google, subscription, *bodies):
    for body in bodies:
        google.waiting.put_nowait(body)
    return await subscription.receive(len(bodies), 60)


async def settle(subscription, how, messages):
    return await (subscription.ack(messages) if how == "ack" else subscription.set_lease(messages, 30))


@pytest.mark.parametrize("how", ["ack", "set_lease"])
async def test_each_stale_id_is_a_lost_lease(google, how):
    google.info.enable_exactly_once_delivery = True
    async with open_subscription(URL) as subscription:
        messages = await received(google, subscription, b"1", b"2", b"3")
        assert await settle(subscription, how, messages) == [None] * 3
        del google.held[messages[1].lease]
        outcomes = await settle(subscription, how, messages)
        assert isinstance(outcomes[1], LeaseLost)
        assert messages[1].id in str(outcomes[1])
        # Whether the others were settled is not said: they are to be said again, and then they are.
        assert [type(outcomes[number]) for number in (0, 2)] == [Transient, Transient]
        assert await settle(subscription, how, [messages[0], messages[2]]) == [None, None]


async def test_any_number_of_stale_ids_is_told(google):
    """As after an outage, when every lease of a busy worker has passed to somebody else."""
    google.info.enable_exactly_once_delivery = True
    messages = [Message(f"m{i}", b"", {}, None, None, f"{i}".rjust(200, "x")) for i in range(5000)]
    async with open_subscription(URL) as subscription:
        outcomes = await subscription.set_lease(messages, 30)
    assert {type(outcome) for outcome in outcomes} == {LeaseLost}


async def test_a_stale_id_is_taken_where_delivery_is_not_exactly_once(google):
    async with open_subscription(URL) as subscription:
        messages = await received(google, subscription, b"1", b"2")
        google.held.clear()
        assert await subscription.ack(messages) == [None, None]


async def test_reasons_that_may_pass_are_transient(google):
    async with open_subscription(URL) as subscription:
        one, two, three = await received(google, subscription, b"1", b"2", b"3")

        async def hook(_request):
            failures = {one.lease: "TRANSIENT_FAILURE_INVALID_ACK_ID", two.lease: "PERMANENT_FAILURE_INVALID_ACK_ID"}
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "no", failures | {three.lease: "SOMETHING_NEW"})

        google.hooks["Acknowledge"] = hook
        outcomes = await subscription.ack([one, two, three])
        assert [type(outcome) for outcome in outcomes] == [Transient, LeaseLost, Transient]
        assert "TRANSIENT_FAILURE_INVALID_ACK_ID" in str(outcomes[0])


@pytest.mark.parametrize(
    ("code", "expected"),
    [(grpc.StatusCode.UNAVAILABLE, Transient), (grpc.StatusCode.PERMISSION_DENIED, Denied)],
)
async def test_an_error_of_the_whole_request_is_everybodys(google, code, expected):
    async with open_subscription(URL) as subscription:
        messages = await received(google, subscription, b"1", b"2")

        async def hook(_request):
            raise Refusal(code, "no")

        google.hooks["Acknowledge"] = hook
        assert [type(outcome) for outcome in await subscription.ack(messages)] == [expected] * 2


async def test_an_ack_id_that_is_refused_is_lost_only_if_it_is_known_which(google):
    async with open_subscription(URL) as subscription:
        messages = await received(google, subscription, b"1", b"2")

        async def hook(_request):
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "Some acknowledgement ids in the request were invalid.")

        google.hooks["Acknowledge"] = hook
        assert [type(outcome) for outcome in await subscription.ack(messages)] == [Transient] * 2
        assert [type(outcome) for outcome in await subscription.ack(messages[:1])] == [LeaseLost]


async def test_seconds_are_whole_and_rounded_up(google):
    async with open_subscription(URL) as subscription:
        messages = await received(google, subscription, b"1")
        for seconds in (600, 59.1, 0.001, 0):
            assert await subscription.set_lease(messages, seconds) == [None]
        for seconds in (600.001, 601, -0.1):
            with pytest.raises(ValueError, match="from 0 to 600"):
                await subscription.set_lease(messages, seconds)
    assert [request.ack_deadline_seconds for request in google.requests("ModifyAckDeadline")] == [600, 60, 1, 0]


@pytest.mark.parametrize("length", [5, 180, 400_000])
async def test_many_ids_are_cut_into_requests_that_the_service_takes(google, length):
    count = 7 if length > 1000 else 6000
    messages = [Message(f"m{i}", b"", {}, None, None, f"{i}".rjust(length, "x")) for i in range(count)]
    async with open_subscription(URL) as subscription:
        assert await subscription.ack(messages) == [None] * count
    requests = google.requests("Acknowledge")
    for request in requests:
        assert len(request.ack_ids) <= 2500
        assert request.ByteSize() <= 512 * 1024
    sent = sorted(itertools.chain.from_iterable(request.ack_ids for request in requests))
    assert sent == sorted(message.lease for message in messages)
    assert module.SETTLE_IDS == 2500
