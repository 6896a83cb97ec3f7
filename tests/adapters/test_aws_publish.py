"""Batches that are sent: what goes together, in which order, and what becomes of the rest where one fails."""

import pytest
from aws_stand_in import ATTRIBUTES, Refusal

from rejoinder.adapters import Outgoing, TooLarge, Transient, open_topic

QUEUE = "awssqs:///q"


async def test_fifo_no_message_overtakes_one_of_its_group_that_failed(stand_in):
    stand_in.on["GetQueueAttributes"] = lambda _: {"Attributes": ATTRIBUTES | {"FifoQueue": "true"}}
    sent = []

    def handler(fields):
        sent.append([entry["MessageBody"] for entry in fields["Entries"]])
        successful, failed = [], []
        for entry in fields["Entries"]:
            if entry["MessageBody"] == "a3":
                failed.append({"Id": entry["Id"], "Code": "InternalError", "SenderFault": False})
            else:
                successful.append({"Id": entry["Id"], "MessageId": entry["MessageBody"]})
        return {"Successful": successful, "Failed": failed}

    stand_in.on["SendMessageBatch"] = handler
    names = [f"{'ab'[number % 2]}{number // 2}" for number in range(50)]
    async with open_topic("awssqs:///q.fifo") as topic:
        outcomes = await topic.publish([Outgoing(name.encode(), ordering_key=name[0]) for name in names])
    told = dict(zip(names, outcomes, strict=True))
    # What went in one call with the one that failed, the service took; nothing of its group was sent after that.
    assert [name for name in names if isinstance(told[name], Transient)] == ["a3", *(f"a{n}" for n in range(5, 25))]
    assert all(told[name] == name for name in names if name[0] == "b")
    for group in "ab":
        order = [name for call in sent for name in call if name[0] == group]
        assert order == [name for name in names if name[0] == group][: len(order)]


async def test_a_call_carries_as_many_groups_as_the_topic_says(stand_in):
    stand_in.on["GetQueueAttributes"] = lambda _: {"Attributes": ATTRIBUTES | {"FifoQueue": "true"}}
    stand_in.on["SendMessageBatch"] = lambda fields: {
        "Successful": [{"Id": entry["Id"], "MessageId": "m"} for entry in fields["Entries"]]
    }
    async with open_topic("awssqs:///q.fifo") as topic:
        await topic.publish([Outgoing(b"x", ordering_key=f"g{number}") for number in range(3 * topic.max_keys)])
    assert len(stand_in.called("SendMessageBatch")) == 3


async def test_batches_hold_at_most_ten_entries_and_one_mebibyte(stand_in):
    sizes = []

    def handler(fields):
        sizes.append([len(entry["MessageBody"]) for entry in fields["Entries"]])
        return {"Successful": [{"Id": one["Id"], "MessageId": one["MessageBody"][:8]} for one in fields["Entries"]]}

    stand_in.on["SendMessageBatch"] = handler
    bodies = [b"%08d" % number + b"x" * size for number, size in enumerate([300_000] * 7 + [10] * 31 + [1_048_568])]
    async with open_topic(QUEUE) as topic:
        outcomes = await topic.publish([Outgoing(body) for body in bodies])
    assert outcomes == [body[:8].decode() for body in bodies]
    assert sum(map(len, sizes)) == len(bodies)
    assert max(map(len, sizes)) == 10
    assert max(map(sum, sizes)) <= 1_048_576
    assert len(sizes) <= 7


@pytest.mark.parametrize("name", ["q", "q.fifo"])
async def test_messages_that_are_too_large_together_go_apart(stand_in, name):
    """A service whose batches hold less than ours think: an answer that fits is not to be refused for its company."""
    fifo = {"FifoQueue": "true"} if name == "q.fifo" else {}
    stand_in.on["GetQueueAttributes"] = lambda _: {"Attributes": ATTRIBUTES | fifo}
    sent = []

    def handler(fields):
        if sum(len(entry["MessageBody"]) for entry in fields["Entries"]) > 2_500:
            raise Refusal("AWS.SimpleQueueService.BatchRequestTooLong")
        sent.extend(entry["MessageBody"][:1] for entry in fields["Entries"])
        return {"Successful": [{"Id": one["Id"], "MessageId": one["MessageBody"][:1]} for one in fields["Entries"]]}

    stand_in.on["SendMessageBatch"] = handler
    async with open_topic(f"awssqs:///{name}") as topic:
        batch = [
            Outgoing(letter.encode() * (3_000 if letter == "E" else 1_000), ordering_key="g") for letter in "abcdEf"
        ]
        outcomes = await topic.publish(batch)
        assert outcomes[:4] == ["a", "b", "c", "d"]
        assert isinstance(outcomes[4], TooLarge)
        if fifo:  # it was refused, and what follows it in its group waits for what becomes of it
            assert isinstance(outcomes[5], Transient)
            assert sent == list("abcd")
        else:
            assert outcomes[5] == "f"


async def test_attributes_count_as_size(stand_in):
    stand_in.on["SendMessageBatch"] = lambda _: {"Successful": [{"Id": "0", "MessageId": "m"}]}
    async with open_topic(QUEUE) as topic:
        room = topic.max_body - len("name") - len("String") - len("value")
        outcomes = [(await topic.publish([Outgoing(b"x" * size, {"name": "value"})]))[0] for size in (room, room + 1)]
    assert outcomes[0] == "m"
    assert isinstance(outcomes[1], TooLarge)


async def test_nothing_is_sent_of_a_batch_that_cannot_be_carried(stand_in):
    async with open_topic(QUEUE) as topic:
        for bad in (Outgoing(b"x", {"aws.x": "1"}), Outgoing(b"x", ordering_key="with space")):
            with pytest.raises(ValueError, match="SQS"):
                await topic.publish([Outgoing(b"good"), bad])
    assert stand_in.called("SendMessageBatch") == []
