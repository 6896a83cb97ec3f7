"""A request that never succeeds is answered once, at the last delivery that its queue allows, and left to the queue."""

import json
from pathlib import Path

from answers import envelopes
from broker_pairs import Pair, on
from pairs import QUIET
from worker_process import SlowWorker

ATTEMPTS = 5
"""The fewest that Pub/Sub takes."""


@on("sqs", "pubsub")
async def test_the_queue_decides_which_attempt_is_the_last(pair: Pair, tmp_path: Path) -> None:
    queues, log = await pair.queues(max_attempts=ATTEMPTS), tmp_path / "worker.log"
    await queues.send(*envelopes(1, fails=1000))
    with SlowWorker(queues, log, 0) as worker:
        (answer,) = await queues.receive(1)
        got = [answer, *await queues.receive_some(QUIET)]
        assert worker.stop() == 0, log.read_text()
    assert [json.loads(message.body)["status_code"] for message in got] == [503]
    assert answer.attributes["attempt"] == str(ATTEMPTS)
    assert not await queues.left_over(), "it is a dead letter now"
