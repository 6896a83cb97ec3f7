import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from brokers import BROKERS
from conformance_bench import Bench


@pytest.fixture(params=BROKERS, ids=lambda broker: broker.name)
async def bench(request, tmp_path) -> AsyncIterator[Bench]:
    """Every adapter, one after the other."""
    _start(request)
    async with AsyncExitStack() as stack:
        yield Bench(request.param, tmp_path, stack)


@pytest.fixture(params=[one for one in BROKERS if one.across_processes], ids=lambda broker: broker.name)
async def shared(request, tmp_path) -> AsyncIterator[Bench]:
    """Every adapter whose queues several processes can open."""
    _start(request)
    async with AsyncExitStack() as stack:
        yield Bench(request.param, tmp_path, stack)


def _start(request) -> None:
    if request.param.service is not None:
        request.getfixturevalue(request.param.service)


@pytest.fixture(autouse=True)
def _silent(caplog):
    """Adapters never log, at any level. What their SDKs say for debugging is theirs."""
    caplog.set_level(0)
    for vendor in ("aiobotocore", "botocore"):
        caplog.set_level("WARNING", logger=vendor)
    yield
    assert not [
        record
        for record in caplog.records
        if record.levelno >= logging.INFO or not record.name.startswith(("asyncio", "google.", "grpc.", "urllib3"))
    ]
