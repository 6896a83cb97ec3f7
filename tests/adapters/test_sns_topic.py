"""SNS topics as sinks, read through the queue that is subscribed, against LocalStack."""

import json

import pytest
from aws_resources import Raw, make_queue, make_topic, name_of, sns

from rejoinder.adapters import NotFound, Outgoing, TooLarge, open_subscription, open_topic

pytestmark = pytest.mark.usefixtures("aws")


async def get(subscription):
    (message,) = await subscription.receive(1, 60)
    assert await subscription.ack([message]) == [None]
    return message


@pytest.mark.parametrize("fifo", [False, True])
@pytest.mark.parametrize("raw", [False, True])
async def test_through_a_topic(aws, fifo, raw):
    queue, _ = await make_queue(fifo=fifo)
    arn = await make_topic(queue, raw=raw)
    async with (
        open_topic(f"awssns:///{arn}") as topic,
        open_subscription(f"awssqs:///{name_of(queue)}") as subscription,
    ):
        assert topic.name == arn
        for body in (b'{"x": 1}', bytes(range(256)), b"a\r\nb", b"", "é\u2028".encode()):
            attributes = {"k": "é\n", "n.1": "2"}
            (sent,) = await topic.publish([Outgoing(body, attributes, ordering_key="g" if fifo else None)])
            message = await get(subscription)
            assert (message.body, dict(message.attributes)) == (body, attributes)
            assert message.ordering_key == ("g" if fifo else None)
            if not raw:
                assert message.id == sent


async def test_a_redelivery_has_the_publishers_id(aws):
    queue, _ = await make_queue()
    arn = await make_topic(queue)
    async with (
        open_topic(f"awssns:///{arn}") as topic,
        open_subscription(f"awssqs:///{name_of(queue)}") as subscription,
    ):
        (sent,) = await topic.publish([Outgoing(b"x")])
        first = await subscription.receive(1, 60)
        assert await subscription.set_lease(first, 0) == [None]
        (again,) = await subscription.receive(1, 60)
        assert [first[0].id, again.id, again.attempt] == [sent, sent, 2]


async def test_what_is_on_the_wire(aws):
    queue, _ = await make_queue()
    async with Raw(queue) as raw, open_topic(f"awssns:///{await make_topic(queue)}") as topic:
        await topic.publish([Outgoing(b"\0", {"k": "v"})])
        envelope = json.loads((await raw.receive())["Body"])
    assert envelope["Message"] == "AA=="
    assert envelope["MessageAttributes"] == {
        "k": {"Type": "String", "Value": "v"},
        "base64encoded": {"Type": "String", "Value": "true"},
    }


async def test_more_than_one_call_takes(aws):
    queue, _ = await make_queue()
    arn = await make_topic(queue)
    async with (
        open_topic(f"awssns:///{arn}") as topic,
        open_subscription(f"awssqs:///{name_of(queue)}") as subscription,
    ):
        ids = await topic.publish([*[Outgoing(b"x" * 100_000)] * 5, *[Outgoing(b"y")] * 25])
        assert len(set(ids)) == 30
        got = set()
        while len(got) < 30:
            messages = await subscription.receive(10, 20)
            assert messages
            got |= {message.id for message in messages}
        assert got == set(ids)
        (outcome,) = await topic.publish([Outgoing(b"x" * (topic.max_body + 1))])
        assert isinstance(outcome, TooLarge)


async def test_a_topic_that_is_not_there(aws):
    with pytest.raises(NotFound, match="sns:GetTopicAttributes on arn:aws:sns:us-east-1:000000000000:nobody"):
        async with open_topic("awssns:///arn:aws:sns:us-east-1:000000000000:nobody"):
            pass


async def test_a_topic_that_goes_away(aws):
    queue, _ = await make_queue()
    arn = await make_topic(queue)
    async with open_topic(f"awssns:///{arn}") as topic:
        async with sns() as client:
            await client.delete_topic(TopicArn=arn)
        (outcome,) = await topic.publish([Outgoing(b"x")])
        assert isinstance(outcome, NotFound)
