"""What the network does to calls of AWS, answers that are none, and what becomes of them."""

import asyncio

import pytest
from aiohttp import web
from aws_stand_in import ATTRIBUTES, TOPIC, failing, received

from rejoinder.adapters import (
    Outgoing,
    Transient,
    open_subscription,
    open_topic,
    sns,
    sqs,
    sqs_subscription,
)
from rejoinder.adapters.aws import Traffic

QUEUE = "awssqs:///q"
SNS = f"awssns:///{TOPIC}"


def hang(_fields):
    async def answer(_request):
        await asyncio.Event().wait()

    return answer


def trickle(_fields):
    async def answer(request):
        response = web.StreamResponse(headers={"Content-Length": "1000000"})
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.02)

    return answer


def cut(_fields):
    async def answer(request):
        request.transport.abort()
        return web.Response()

    return answer


def cut_in_the_middle(_fields):
    async def answer(request):
        response = web.StreamResponse(headers={"Content-Length": "1000000"})
        await response.prepare(request)
        await response.write(b"{")
        request.transport.abort()
        return response

    return answer


FAULTS = {
    "hang": hang,
    "trickle": trickle,
    "cut": cut,
    "cut in the middle": cut_in_the_middle,
    "no http": lambda _: web.Response(status=502, text="<html>bad gateway</html>"),
    "binary": lambda _: web.Response(status=500, body=b"\xff\xfe\0garbage"),
}


@pytest.fixture
def _impatient(monkeypatch):
    monkeypatch.setattr("rejoinder.adapters.aws.CONNECT_SECONDS", 1.0)
    monkeypatch.setattr("rejoinder.adapters.aws.SPARE_SECONDS", 0.1)
    for name in ("RECEIVING", "SENDING", "SETTLING"):
        monkeypatch.setattr(sqs, name, Traffic(2, 1.0))
    monkeypatch.setattr(sns, "SENDING", Traffic(2, 1.0))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("_impatient")
async def test_a_fault_of_the_network_is_transient(stand_in, fault):
    stand_in.on["ReceiveMessage"] = lambda _: received(1)
    async with open_subscription(QUEUE) as subscription, open_topic(QUEUE) as queue, open_topic(SNS) as topic:
        messages = await subscription.receive(1, 0)
        names = ("ReceiveMessage", "SendMessageBatch", "PublishBatch", "DeleteMessageBatch", "GetQueueAttributes")
        stand_in.on |= dict.fromkeys(names, FAULTS[fault])
        with pytest.raises(Transient):
            await subscription.receive(1, 0)
        with pytest.raises(Transient):
            await subscription.backlog()
        for outcomes in (
            await queue.publish([Outgoing(b"x")]),
            await topic.publish([Outgoing(b"x")]),
            await subscription.ack(messages),
        ):
            assert [type(outcome) for outcome in outcomes] == [Transient]


@pytest.mark.parametrize("body", [b"", b"garbage", b"\xff\xfe\0", b"[]", b"{}", b'{"Successful": 3}', b"null"])
async def test_a_garbled_success_is_no_success(stand_in, body):
    stand_in.on["SendMessageBatch"] = stand_in.on["PublishBatch"] = lambda _: web.Response(body=body)
    async with open_topic(QUEUE) as queue, open_topic(SNS) as topic:
        for one in (queue, topic):
            (outcome,) = await one.publish([Outgoing(b"x")])
            assert isinstance(outcome, Transient)


GARBLED = {
    "GetQueueUrl": [{}],
    "GetQueueAttributes": [{"Attributes": {}}, {"Attributes": ATTRIBUTES | {"RedrivePolicy": "{"}}],
    "GetTopicAttributes": [{"Attributes": {"entry": {"key": "MaximumMessageSize", "value": "many"}}}],
    "ReceiveMessage": [{"Messages": [one]} for one in ({}, {"ReceiptHandle": "r", "Body": "x"})],
    "DeleteMessageBatch": [{"Successful": [{}]}, {"Failed": [{"Code": "x"}]}, {"Failed": [{"Id": "7", "Code": "x"}]}],
    "SendMessageBatch": [{"Successful": [{"Id": "0"}]}, {"Successful": [{"MessageId": "m"}]}, {"Failed": [{}]}],
}


@pytest.mark.parametrize(("operation", "answer"), [(name, one) for name, some in GARBLED.items() for one in some])
async def test_an_answer_that_lacks_something_is_transient(stand_in, operation, answer):
    """As one whose bytes were changed on the way: the worker waits, and does not end over a KeyError."""
    stand_in.on["ReceiveMessage"] = lambda _: received(1)
    stand_in.on[operation] = lambda _: answer
    if operation.startswith("Get"):
        with pytest.raises(Transient, match=f":{operation} on"):
            async with open_topic(SNS if "Topic" in operation else QUEUE):
                pass
        return
    async with open_subscription(QUEUE) as subscription, open_topic(QUEUE) as topic:
        if operation == "ReceiveMessage":
            with pytest.raises(Transient, match="sqs:ReceiveMessage on"):
                await subscription.receive(1, 0)
        else:
            messages = await subscription.receive(1, 0)
            outcomes = await (topic.publish([Outgoing(b"x")]) if "Send" in operation else subscription.ack(messages))
            assert [type(outcome) for outcome in outcomes] == [Transient]


async def test_closing_does_not_wait_for_ever_for_a_poll_that_hangs(stand_in, monkeypatch):
    monkeypatch.setattr(sqs_subscription, "CLOSING_SECONDS", 0.1)
    stand_in.on["ReceiveMessage"] = hang
    async with asyncio.timeout(60):
        async with open_subscription(QUEUE) as subscription:
            receives = [asyncio.create_task(subscription.receive(1, 20)) for _ in range(40)]  # some wait for a slot
            while not stand_in.called("ReceiveMessage"):
                await asyncio.sleep(0.001)
            for task in receives:
                task.cancel()
            await asyncio.wait(receives)
        ours = [task for task in asyncio.all_tasks() if "SQSSubscription" in repr(task.get_coro())]
    assert not ours


async def test_hung_calls_of_one_kind_leave_the_others_alone(stand_in, monkeypatch):
    for name in ("RECEIVING", "SENDING", "SETTLING"):
        monkeypatch.setattr(sqs, name, Traffic(2, 60.0))
    release = asyncio.Event()
    stand_in.on["ReceiveMessage"] = lambda _: received(1)
    stand_in.on["DeleteMessageBatch"] = failing({})
    stand_in.on["SendMessageBatch"] = lambda fields: {
        "Successful": [{"Id": entry["Id"], "MessageId": "m"} for entry in fields["Entries"]]
    }
    async with open_subscription(QUEUE) as subscription, open_topic(QUEUE) as topic:
        messages = await subscription.receive(1, 0)

        def wait(_fields):
            async def answer(_request):
                await release.wait()
                return web.Response(text="{}", content_type="application/x-amz-json-1.0")

            return answer

        stand_in.on["ReceiveMessage"] = wait
        receives = [asyncio.create_task(subscription.receive(1, 0)) for _ in range(10)]
        while len(stand_in.called("ReceiveMessage")) < 3:  # one before, and as many as there are connections
            await asyncio.sleep(0.001)
        assert await topic.publish([Outgoing(b"x")]) == ["m"]
        assert await subscription.ack(messages) == [None]
        assert not any(task.done() for task in receives)
        release.set()
        assert await asyncio.gather(*receives) == [[]] * 10
