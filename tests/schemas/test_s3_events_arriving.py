"""S3's own events, as they arrive on a queue that a bucket notifies."""

import asyncio
import uuid

from aiobotocore.session import get_session
from aws_resources import make_queue, name_of

from rejoinder.adapters import open_subscription
from rejoinder.schemas.s3_events import Record, TestEvent, read_event

KEYS = ("plain.json", "with space+plus %2F/é ü.json", "in/a&b=c;d?e#f.json")


async def test_events_of_a_bucket_are_read(aws):
    queue, _ = await make_queue()
    bucket = f"b-{uuid.uuid4().hex}"
    events = []
    async with get_session().create_client("s3") as s3, open_subscription(f"awssqs:///{name_of(queue)}") as source:
        await s3.create_bucket(Bucket=bucket)
        rule = {"QueueArn": queue, "Events": ["s3:ObjectCreated:*", "s3:ObjectRemoved:*"]}
        await s3.put_bucket_notification_configuration(
            Bucket=bucket, NotificationConfiguration={"QueueConfigurations": [rule]}
        )
        for key in KEYS:
            await s3.put_object(Bucket=bucket, Key=key, Body=key.encode())
        await s3.delete_object(Bucket=bucket, Key=KEYS[0])
        async with asyncio.timeout(60):
            while len(events) < len(KEYS) + 2:
                messages = await source.receive(10, 5)
                events += [read_event(message.body) for message in messages]
                await source.ack(messages)
    assert sum(isinstance(event, TestEvent) for event in events) == 1
    records = [record for event in events if isinstance(event, list) for record in event]
    made = {record.key: record for record in records if isinstance(record, Record)}
    assert {key: record.size for key, record in made.items()} == {key: len(key.encode()) for key in KEYS}
    assert {record.location for record in made.values()} == {f"s3://{bucket}/{key}" for key in KEYS}
    assert all(
        record.event_name == "ObjectCreated:Put" and record.etag and record.sequencer for record in made.values()
    )
    (removed,) = [record for record in records if not isinstance(record, Record)]
    assert removed.param == "Records.0.eventName"
    assert "ObjectRemoved:Delete" in str(removed)
