"""What the Pub/Sub adapter's tests share: a service of our own to speak with."""

import pytest
from pubsub_service import Service, serving


@pytest.fixture
async def google(monkeypatch):
    """Our own Pub/Sub service, which the adapter takes for the emulator."""
    one = Service()
    async with serving(one) as address:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", address)
        yield one
