"""What SQS alone does, against LocalStack."""

import asyncio
import gc

import aws_resources
import psutil
import pytest
from aws_resources import Raw, make_queue, name_of

from rejoinder.adapters import NotFound, Outgoing, open_subscription, open_topic

pytestmark = pytest.mark.usefixtures("aws")


def url(arn, query=""):
    return f"awssqs:///{name_of(arn)}{query}"


async def all_of(subscription, count):
    got = []
    async with asyncio.timeout(60):
        while len(got) < count:
            got += await subscription.receive(10, 5)
    return got


async def test_what_opening_reads(aws):
    queue, dead = await make_queue(max_attempts=4, VisibilityTimeout=17, MaximumMessageSize=2048)
    *_, region, account, name = queue.split(":")
    async with (
        open_subscription(url(queue)) as one,
        open_subscription(f"awssqs://sqs.{region}.amazonaws.com/{account}/{name}?region={region}&lease=5") as other,
        open_topic(url(queue)) as topic,
    ):
        assert one.name == other.name == topic.name == queue
        assert (one.lease_seconds, other.lease_seconds) == (17, 5)
        assert (one.max_attempts, one.max_receive, one.keeps_order) == (4, 10, False)
        assert topic.max_body == 2048
    async with open_subscription(url(dead)) as subscription:
        assert subscription.max_attempts is None


async def test_a_queue_that_is_not_there(aws):
    queue, _ = await make_queue()
    for wrong in ("awssqs:///nobody", url(queue, "?region=eu-west-1")):
        with pytest.raises(NotFound, match="no queue"):
            async with open_topic(wrong):
                pass


async def test_a_queue_that_goes_away(aws):
    queue, _ = await make_queue()
    async with open_subscription(url(queue)) as subscription, open_topic(url(queue)) as topic:
        async with aws_resources.sqs() as client:
            await client.delete_queue(QueueUrl=(await client.get_queue_url(QueueName=name_of(queue)))["QueueUrl"])
        with pytest.raises(NotFound):
            await subscription.receive(1, 0)
        (outcome,) = await topic.publish([Outgoing(b"x")])
        assert isinstance(outcome, NotFound)


async def test_what_other_programs_send(aws):
    queue, _ = await make_queue()
    header = "Root=1-5759e988-bd862e3fe1be46a994272793;Parent=53995c3f42cd8ad8;Sampled=1"
    attributes = {
        "s": "text",
        "n": {"DataType": "Number", "StringValue": "1.5"},
        "b": {"DataType": "Binary", "BinaryValue": b"\0\1"},
    }
    async with Raw(queue) as raw, open_subscription(url(queue)) as subscription:
        sent = await raw.send(
            "a\r\nb\x85",
            attributes,
            MessageGroupId="tenant",
            MessageSystemAttributes={"AWSTraceHeader": {"DataType": "String", "StringValue": header}},
        )
        (message,) = await subscription.receive(1, 60)
    assert (message.id, message.body, message.ordering_key) == (sent, "a\r\nb\x85".encode(), "tenant")
    assert dict(message.attributes) == {
        "s": "text",
        "n": "1.5",
        "b": "AAE=",
        "traceparent": "00-5759e988bd862e3fe1be46a994272793-53995c3f42cd8ad8-01",
    }


async def test_what_other_programs_receive(aws):
    queue, _ = await make_queue()
    async with Raw(queue) as raw, open_topic(url(queue)) as topic:
        await topic.publish([Outgoing("é".encode(), {"k": "v"}, ordering_key="tenant", deduplication_id="d")])
        text = await raw.receive()
        await topic.publish([Outgoing(b"\0")])
        coded = await raw.receive()
    assert (text["Body"], text["MessageAttributes"]) == ("é", {"k": {"DataType": "String", "StringValue": "v"}})
    assert text["Attributes"]["MessageGroupId"] == "tenant"
    assert coded["Body"] == "AA=="
    assert coded["MessageAttributes"]["base64encoded"]["StringValue"] == "true"


async def test_settling_more_than_one_call_takes(aws):
    queue, _ = await make_queue()
    async with open_subscription(url(queue)) as subscription, open_topic(url(queue)) as topic:
        ids = await topic.publish([Outgoing(b"%d" % number) for number in range(45)])
        messages = await all_of(subscription, 45)
        assert {message.id for message in messages} == set(ids)
        assert await subscription.set_lease(messages, 30) == [None] * 45
        assert await subscription.ack(messages) == [None] * 45
        assert await subscription.receive(1, 0) == []


async def test_an_ack_after_the_lease_while_nobody_else_has_it(aws):
    queue, _ = await make_queue()
    async with open_subscription(url(queue, "?lease=1")) as subscription, open_topic(url(queue)) as topic:
        await topic.publish([Outgoing(b"x")])
        messages = await subscription.receive(1, 60)
        async with asyncio.timeout(60):
            while (await subscription.backlog()).waiting != 1:
                await asyncio.sleep(0.05)
        assert await subscription.ack(messages) == [None]
        backlog = await subscription.backlog()
        assert (backlog.waiting, backlog.held) == (0, 0)


async def test_backlog_counts_the_dead_letter_queue(aws):
    queue, dead = await make_queue(max_attempts=1)
    async with (
        open_subscription(url(queue)) as subscription,
        open_topic(url(queue)) as topic,
        open_topic(url(dead)) as graveyard,
    ):
        await topic.publish([Outgoing(b"x")] * 3)
        await graveyard.publish([Outgoing(b"x")] * 2)
        await subscription.receive(1, 60)
        backlog = await subscription.backlog()
        assert (backlog.waiting, backlog.held, backlog.dead) == (2, 1, 2)


async def test_what_arrives_for_a_cancelled_receive_is_let_go(aws):
    queue, _ = await make_queue()
    async with open_topic(url(queue)) as topic:
        async with open_subscription(url(queue, "?lease=600")) as subscription:
            receiving = [asyncio.create_task(subscription.receive(10, 600)) for _ in range(3)]
            await asyncio.sleep(0)
            await subscription.receive(1, 0)  # by now the others wait too
            for task in receiving:
                task.cancel()
            await asyncio.gather(*receiving, return_exceptions=True)
            assert all(task.cancelled() for task in receiving)
            ids = await topic.publish([Outgoing(b"1"), Outgoing(b"2")])
        # Closing waited for the calls under way, and nothing is leased for ten minutes.
        async with open_subscription(url(queue)) as subscription:
            assert {message.id for message in await all_of(subscription, 2)} == set(ids)


async def test_closing_leaves_nothing_behind(aws):
    queue, _ = await make_queue()
    process = psutil.Process()

    def open_connections():
        gc.collect()
        return {one.laddr for one in process.net_connections("tcp") if one.status != psutil.CONN_TIME_WAIT}

    before, threads = open_connections(), None
    for _ in range(3):
        async with open_subscription(url(queue)) as subscription, open_topic(url(queue)) as topic:
            await topic.publish([Outgoing(b"x")] * 40)
            await asyncio.gather(*(subscription.receive(5, 1) for _ in range(4)))
            assert len(open_connections() - before) > 2
            cancelled = asyncio.create_task(subscription.receive(5, 600))
            await asyncio.sleep(0)
            cancelled.cancel()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        async with asyncio.timeout(60):
            while open_connections() - before:  # a closed socket is gone at the loop's next step
                await asyncio.sleep(0.01)
        # The loop's own pool of threads keeps what it has; it does not grow by being used again.
        threads = threads or process.num_threads()
        assert process.num_threads() <= threads + 1


async def test_fifo_order_and_deduplication(aws):
    queue, _ = await make_queue(fifo=True)
    async with open_subscription(url(queue)) as subscription, open_topic(url(queue)) as topic:
        assert subscription.keeps_order
        batch = [Outgoing(b"%d" % number, ordering_key=f"g{number % 3}") for number in range(60)]
        await topic.publish(batch)
        got: dict[str, list[int]] = {}
        async with asyncio.timeout(60):
            while sum(map(len, got.values())) < 60:
                messages = await subscription.receive(10, 5)
                for message in messages:
                    got.setdefault(message.ordering_key, []).append(int(message.body))
                assert await subscription.ack(messages) == [None] * len(messages)
        assert got == {f"g{rest}": list(range(rest, 60, 3)) for rest in range(3)}

        odd = "an id with spaces, é, and more than the 128 characters that SQS takes" * 3
        for identity in ("d-1", odd):
            twice = [Outgoing(b"first", deduplication_id=identity), Outgoing(b"second", deduplication_id=identity)]
            one, other = await topic.publish(twice)
            assert one == other
            (message,) = await all_of(subscription, 1)
            assert (message.id, message.body) == (one, b"first")
            assert await subscription.ack([message]) == [None]
        assert await subscription.receive(10, 0) == []
        # Without an id of their own, equal messages are different ones.
        await topic.publish([Outgoing(b"same"), Outgoing(b"same")])
        assert len(await all_of(subscription, 2)) == 2
