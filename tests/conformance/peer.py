"""Another process on the same broker: `peer.py consume|hold|publish URL`. It prints one JSON line for each event."""

import asyncio
import json
import sys
import time

from rejoinder.adapters import Outgoing, open_subscription, open_topic


def say(**event):
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


async def consume(url):
    async with open_subscription(url) as subscription:
        while True:
            messages = await subscription.receive(5, 60)
            outcomes = await subscription.ack(messages)
            say(ids=[message.id for message in messages], lost=sum(outcome is not None for outcome in outcomes))


async def hold(url):
    async with open_subscription(url) as subscription:
        before = time.time()
        (message,) = await subscription.receive(1, 60)
        say(id=message.id, attempt=message.attempt, before=before)
        await asyncio.Event().wait()


async def publish(url):
    async with open_topic(url) as topic:
        for number in range(1_000_000):
            say(ids=await topic.publish([Outgoing(b"%d" % number)] * 5))


asyncio.run({"consume": consume, "hold": hold, "publish": publish}[sys.argv[1]](sys.argv[2]))
