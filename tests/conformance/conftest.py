from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from brokers import BROKERS
from conformance_bench import Bench
from needs import able


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bench" in metafunc.fixturenames:
        kinds = getattr(metafunc.module, "KINDS", BROKERS)
        metafunc.parametrize("bench", able(metafunc, kinds), ids=lambda kind: kind.name, indirect=True)


@pytest.fixture
async def bench(request, tmp_path) -> AsyncIterator[Bench]:
    """Every adapter that has what the test `needs`, one after the other."""
    if request.param.service is not None:
        request.getfixturevalue(request.param.service)
    async with AsyncExitStack() as stack:
        yield Bench(request.param, tmp_path, stack)


@pytest.fixture(autouse=True)
def _silent(caplog):
    """Adapters never log, at any level. What their SDKs say for debugging is theirs."""
    caplog.set_level(0)
    chatty = {"aiobotocore": 30, "botocore": 30, "asyncio": 20, "google": 20, "grpc": 20, "urllib3": 20}
    chatty["aiohttp.server"] = 100  # the tests' own services, whose clients may leave early
    for vendor, level in chatty.items():
        caplog.set_level(level, logger=vendor)
    yield
    records = [record for when in ("setup", "call", "teardown") for record in caplog.get_records(when)]
    # gRPC's one poller may still have something for the loop of the test before, where a process has only one loop.
    assert not [record for record in records if "PollerCompletionQueue._handle_events" not in record.getMessage()]
