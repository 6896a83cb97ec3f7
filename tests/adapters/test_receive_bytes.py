"""One receive is bounded in bytes, whatever its limit."""

from pathlib import Path

import pytest

from rejoinder.adapters import Outgoing, memory, open_subscription, open_topic, sqlite_statements


@pytest.mark.parametrize("broker", ["memory", "sqlite"])
async def test_a_receive_ends_with_the_message_that_fills_it(
    broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (memory, sqlite_statements):
        monkeypatch.setattr(module, "RECEIVE_BYTES", 1000)
    url = memory.fresh_url() if broker == "memory" else f"sqlite:///{tmp_path / 'q.db'}?queue=q"
    async with open_topic(url) as topic, open_subscription(url) as subscription:
        await topic.publish([Outgoing(bytes([n]) * size) for n, size in enumerate([400, 400, 400, 5000, 1])])
        sizes = []
        for _ in range(3):
            messages = await subscription.receive(10, 1)
            sizes.append([len(message.body) for message in messages])
            await subscription.ack(messages)
        assert sizes == [[400, 400, 400], [5000], [1]]
