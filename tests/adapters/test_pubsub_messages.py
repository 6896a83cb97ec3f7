"""What a message looks like on the way in, and how a batch is cut on the way out."""

import asyncio
import collections

import grpc
import pubsub_resources
import pytest
from pubsub_service import TOPIC, Refusal

from rejoinder.adapters import NotFound, Outgoing, Refused, TooLarge, Transient, open_subscription, open_topic

URL = f"gcppubsub://{TOPIC}"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_a_message_as_the_broker_gives_it(gcp):
    subscription_name, topic_name, _ = await pubsub_resources.make(max_attempts=5, enable_message_ordering=True)
    async with (
        open_subscription(f"gcppubsub://{subscription_name}") as subscription,
        open_topic(f"gcppubsub://{topic_name}") as topic,
    ):
        assert topic.name == f"gcppubsub://{topic_name}"
        (sent,) = await topic.publish([Outgoing(b"\xff\0", {"a": "é"}, ordering_key="k", deduplication_id="unused")])
        (message,) = await subscription.receive(5, 60)
        assert (message.id, message.body, dict(message.attributes)) == (sent, b"\xff\0", {"a": "é"})
        assert (message.ordering_key, message.attempt, message.stored_at) == ("k", 1, None)
        assert type(message.body) is bytes
        with pytest.raises(TypeError):
            message.attributes["a"] = "b"
        assert await subscription.ack([message]) == [None]


async def test_googles_name_of_the_trace_is_read(gcp):
    subscription_name, topic_name, _ = await pubsub_resources.make()
    async with (
        open_subscription(f"gcppubsub://{subscription_name}") as subscription,
        open_topic(f"gcppubsub://{topic_name}") as topic,
    ):
        # As Google's client libraries send it; our own senders may not use names of Google's.
        from rejoinder.adapters.pubsub_wire import PublishRequest

        for attributes in ({"googclient_traceparent": TRACE}, {"googclient_traceparent": TRACE, "traceparent": "own"}):
            await topic._publish(
                PublishRequest(topic=topic_name, messages=[{"data": b"x", "attributes": attributes}]), 10
            )
        got = []
        while len(got) < 2:
            got += [message.attributes["traceparent"] for message in await subscription.receive(2, 5)]
        assert sorted(got) == [TRACE, "own"]


@pytest.mark.parametrize(
    ("outgoing", "named"),
    [
        (Outgoing(b"x", {"googly": "v"}), "googly"),
        (Outgoing(b"x", {"": "v"}), "1 to 256"),
        (Outgoing(b"x", {"k" * 257: "v"}), "1 to 256"),
        (Outgoing(b"x", {"k": "é" * 513}), "1026 bytes"),
        (Outgoing(b"x", ordering_key="k" * 1025), "ordering key"),
        (Outgoing(b""), "neither a body nor attributes"),
    ],
)
async def test_what_cannot_be_carried_is_refused_by_name(google, outgoing, named):
    async with open_topic(URL) as topic:
        with pytest.raises(ValueError, match=named):
            await topic.publish([Outgoing(b"good"), outgoing])
    assert not google.requests("Publish")


async def test_a_batch_is_cut_into_requests_that_the_service_takes(google):
    largest = {"k" * 200 + str(number): "v" * 1024 for number in range(9)}
    async with open_topic(URL) as topic:
        batch = [
            *(Outgoing(b"x") for _ in range(2500)),
            *(Outgoing(bytes(topic.max_body), largest, ordering_key="k" * 128) for _ in range(2)),
            *(Outgoing(bytes(3_000_000)) for _ in range(5)),
            Outgoing(bytes(topic.max_body + 1)),
        ]
        outcomes = await topic.publish(batch)
    assert [type(outcome) for outcome in outcomes] == [str] * 2507 + [TooLarge]
    assert len(set(outcomes)) == 2508
    assert sum(len(request.messages) for request in google.requests("Publish")) == 2507


async def test_each_ordering_key_is_sent_alone_and_in_order(google):
    running: collections.Counter[str] = collections.Counter()

    async def hook(request):
        key = request.messages[0].ordering_key
        running[key] += 1
        assert running[key] == 1, "two requests of one key at once"
        await asyncio.sleep(0.001)
        running[key] -= 1

    google.hooks["Publish"] = hook
    async with open_topic(URL) as topic:
        batch = [Outgoing(b"%d" % number, ordering_key=f"key{number % 40}") for number in range(400)]
        batch += [Outgoing(bytes(6_000_000), {"n": str(number)}, ordering_key="large") for number in range(3)]
        outcomes = await topic.publish(batch)
        assert all(isinstance(outcome, str) for outcome in outcomes)
    sent: dict[str, list] = {}
    for request in google.requests("Publish"):
        for message in request.messages:
            sent.setdefault(message.ordering_key, []).append(message.attributes["n"] or int(message.data))
    assert sent.pop("large") == ["0", "1", "2"]
    assert sent == {f"key{key}": list(range(key, 400, 40)) for key in range(40)}


async def test_a_call_carries_as_many_keys_as_the_topic_says(google):
    async with open_topic(URL) as topic:
        await topic.publish([Outgoing(b"x", ordering_key=f"key{number}") for number in range(3 * topic.max_keys)])
    assert len(google.requests("Publish")) == 3


async def test_what_follows_a_failure_of_its_key_is_held_back_and_no_other(google):
    async def hook(request):
        if any(message.attributes["n"] == "1" for message in request.messages):
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "not now")

    google.hooks["Publish"] = hook
    async with open_topic(URL) as topic:
        large = [Outgoing(bytes(6_000_000), {"n": str(number)}, ordering_key="large") for number in range(4)]
        outcomes = await topic.publish([*large, Outgoing(b"x", ordering_key="other"), Outgoing(b"x")])
    assert [type(outcome) for outcome in outcomes] == [str, Transient, Transient, Transient, str, str]
    assert "not now" in str(outcomes[1])
    assert "a message before it of its ordering key failed" in str(outcomes[2])
    sent = [message.attributes["n"] for request in google.requests("Publish") for message in request.messages]
    assert sorted(one for one in sent if one) == ["0", "1"]


@pytest.mark.parametrize("key", [None, "k"])
async def test_a_message_that_the_topic_refuses_fails_no_other(google, key):
    """As by a schema or a transform of the topic, of which nothing is known here."""

    taken = []

    async def hook(request):
        numbers = [int(message.attributes["n"]) for message in request.messages]
        if {3, 8} & set(numbers):
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "The message does not match the schema.")
        taken.extend(numbers)

    google.hooks["Publish"] = hook
    async with open_topic(URL) as topic:
        batch = [Outgoing(b"x", {"n": str(number)}, ordering_key=key) for number in range(20)]
        outcomes = await topic.publish(batch)
    kinds = [Refused if number in (3, 8) else str for number in range(20)]
    assert [type(outcome) for outcome in outcomes] == kinds
    assert "schema" in str(outcomes[3])
    assert (taken if key else sorted(taken)) == [number for number in range(20) if number not in (3, 8)]


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        (grpc.StatusCode.NOT_FOUND, "Resource not found (resource=t).", NotFound),
        (grpc.StatusCode.INVALID_ARGUMENT, "Request payload size exceeds the limit: 10485760 bytes.", TooLarge),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "too slow", Transient),
    ],
)
async def test_a_failed_request_is_an_outcome_of_its_messages(google, code, details, expected):
    async with open_topic(URL) as topic:

        async def hook(_request):
            raise Refusal(code, details)

        google.hooks["Publish"] = hook
        assert [type(outcome) for outcome in await topic.publish([Outgoing(b"1"), Outgoing(b"2")])] == [expected] * 2
