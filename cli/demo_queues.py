"""The demo's queues: which URL is for what, and reading only the answers of one's own run."""

import json
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial

from rejoinder.adapters import BadURL, Message, open_subscription, open_topic
from rejoinder.cli.errors import ExitCode, Failure
from rejoinder.cli.running import refuse_memory
from rejoinder.client.patience import patiently, to_its_end

BATCH = 100
POLL_SECONDS = 5.0
"""Of one receive; a stop cancels it."""


@dataclass(frozen=True, slots=True)
class Queues:
    """The URLs of one run."""

    requests: str
    """What the worker pulls from."""
    responses: str
    """What it publishes to."""
    publish_to: str | None = None
    """Where the demo publishes, if that is another URL."""
    consume_from: str | None = None
    """Where the demo receives, if that is another URL."""

    @property
    def sending(self) -> str:
        """Where the demo publishes requests."""
        return self.publish_to or self.requests

    @property
    def receiving(self) -> str:
        """Where the demo receives responses."""
        return self.consume_from or self.responses

    async def check(self) -> None:
        """Open all four ends once, before anything that takes long.

        Raises:
            Failure: one end cannot be what it is asked to be, or another option has to say what is; usage.
            AdapterError: as its message says.
        """
        for url in (self.requests, self.responses, self.sending, self.receiving):
            refuse_memory(url)
        await _try(open_subscription(self.requests), "--requests")
        await _try(open_topic(self.responses), "--responses")
        if self.publish_to is None:
            hint = "; name the topic behind it with --publish-to URL"
            await _try(open_topic(self.sending), "--requests, to publish to", hint)
        else:
            await _try(open_topic(self.publish_to), "--publish-to")
        if self.consume_from is None:
            hint = "; name a subscription or queue of it with --consume-from URL"
            await _try(open_subscription(self.receiving), "--responses, to receive from", hint)
        else:
            await _try(open_subscription(self.consume_from), "--consume-from")


async def _try(end: AbstractAsyncContextManager[object], option: str, hint: str = "") -> None:
    try:
        async with end:
            pass
    except BadURL as exc:
        raise Failure(f"{option}: {exc}{hint}", ExitCode.USAGE) from exc


async def own_answers(url: str, run: str, count: int) -> AsyncGenerator[bytes, None]:
    """Receive the first `count` different answers to requests of `run`; asking for the next acks those before it.

    Other messages are somebody else's: they are held until this ends, or their lease, and then are as they were but for
    one more attempt. A second delivery of the same answer is acked and not given.
    """
    seen: set[int] = set()
    others: list[Message] = []
    async with open_subscription(url) as subscription:
        try:
            while len(seen) < count:
                messages = await patiently(partial(subscription.receive, BATCH, POLL_SECONDS))
                own = []
                for message in messages:
                    number = _number(message.body, run)
                    if number is None:
                        others.append(message)
                        continue
                    own.append(message)
                    if number not in seen:
                        seen.add(number)
                        yield message.body
                if own:
                    await to_its_end(patiently(partial(subscription.ack, own)))
        finally:
            if others:
                await subscription.set_lease(others, 0)


def _number(body: bytes, run: str) -> int | None:
    """The id of the request that this answers; None if it is not one of `run`."""
    try:
        response = json.loads(body)
        metadata = response["metadata"]
        return int(metadata["id"]) if metadata["run"] == run else None
    except (ValueError, TypeError, KeyError):  # anything may be in a queue
        return None
