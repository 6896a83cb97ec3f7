"""A message that is settled is gone: it does not wait for the garbage collector, which may not come by for long."""

import gc
from collections.abc import Iterator

import pytest
from worker_harness import GateEngine, bench, until, until_empty

from rejoinder.worker.errors import BadRequest, Unavailable
from rejoinder.worker.held import Held


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
async def test_nothing_that_was_held_is_left_to_the_collector() -> None:
    engine = GateEngine()
    engine.open = True
    engine.errors = {
        "refused": [BadRequest("no")],
        "fails": [ValueError("a bug")] * 3,
        "comes back": [Unavailable("later")],
    }
    async with bench(engine, max_attempts=3) as it:
        for body in ("works", "refused", "fails", "comes back"):
            await it.send(body)
        await it.send_raw(b'{"metadata": {"n": 1}, "body": 1, "body": 2}')
        await it.send("expired", options={"deadline": "2020-01-01T00:00:00Z"})
        await it.responses_until(6)
        await until_empty(it)
        await until(lambda: not any(type(one) is Held for one in gc.get_objects()))
