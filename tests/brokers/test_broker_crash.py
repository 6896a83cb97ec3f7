"""SIGKILL of one of two workers, on each broker: nothing is lost, and no request gets two different answers."""

from pathlib import Path

from answers import check_answers, envelopes
from broker_pairs import Pair, on
from pairs import QUIET
from worker_process import SlowWorker

from rejoinder.adapters import Message

REQUESTS = 300


@on("sqs", "pubsub", "sqs>pubsub", "pubsub>sqs")
async def test_what_a_killed_worker_held_is_answered_by_the_other(pair: Pair, tmp_path: Path) -> None:
    queues, log = await pair.queues(), tmp_path / "worker.log"
    await queues.send(*envelopes(REQUESTS))
    got: list[Message] = []
    with SlowWorker(queues, log, 0.1) as first, SlowWorker(queues, log, 0.1) as second:
        await queues.receive(REQUESTS // 4, got=got)
        first.kill()
        await queues.receive(REQUESTS // 2, got=got)
        with SlowWorker(queues, log, 0.1) as third:
            second.kill()
            await queues.receive(REQUESTS, got=got)
            assert third.stop() == 0, log.read_text()
    got += await queues.receive_some(QUIET)
    check_answers(got, range(REQUESTS))
    assert not await queues.left_over()
