"""A broker that is away when the client opens it is waited for; one that refuses is not."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from rejoinder.adapters import NotFound, Transient, open_subscription, open_topic
from rejoinder.adapters.memory import fresh_url
from rejoinder.client import consume, patience, publish
from rejoinder.client.consume import batches, responses
from rejoinder.client.publish import Publisher

REQUEST = {"metadata": {}, "body": {}}


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_DELAY", 0.001)


def failing(real: Any, *errors: Exception) -> Any:
    left = list(errors)

    @contextlib.asynccontextmanager
    async def opened(url: str) -> AsyncIterator[Any]:
        if left:
            raise left.pop(0)
        async with real(url) as it:
            yield it

    return opened


async def test_a_broker_that_is_away_at_first_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "open_topic", failing(open_topic, Transient("away"), Transient("busy")))
    url = fresh_url()
    async with Publisher(url) as publisher:
        await publisher.publish(REQUEST)
        await publisher.publish(REQUEST)
    monkeypatch.setattr(consume, "open_subscription", failing(open_subscription, Transient("away")))
    async with contextlib.aclosing(responses(url, count=1)) as incoming:
        assert len([response async for response in incoming]) == 1
    monkeypatch.setattr(consume, "open_subscription", failing(open_subscription, Transient("away")))
    async with contextlib.aclosing(batches(url, idle=0.0)) as incoming_batches:
        assert [len(batch) async for batch in incoming_batches] == [1]


@pytest.mark.parametrize("errors", [[NotFound("no queue")], [Transient("no queue")] * (patience.RETRIES + 1)])
async def test_one_that_refuses_or_stays_away_is_said(monkeypatch: pytest.MonkeyPatch, errors: list[Exception]) -> None:
    monkeypatch.setattr(publish, "open_topic", failing(open_topic, *errors))
    with pytest.raises(type(errors[0]), match="no queue"):
        async with Publisher(fresh_url()):
            pass
