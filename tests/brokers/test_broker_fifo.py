"""Groups of a FIFO queue keep their order from end to end, through failures in their midst and a SIGKILL."""

import json
from collections import defaultdict
from pathlib import Path

from answers import check_answers, number
from broker_pairs import Pair, on
from pairs import QUIET
from worker_process import SlowWorker

from rejoinder.adapters import Message

GROUPS = 5
IN_A_GROUP = 12


def request(n: int) -> bytes:
    """Every fourth fails on its first two deliveries."""
    body = {"prompt": f"p{n}", "fails": 2 if n % 4 == 3 else 0}
    return json.dumps({"path": "/echo", "metadata": {"id": n}, "body": body}).encode()


@on("fifo")
async def test_answers_come_in_the_order_of_their_group(pair: Pair, tmp_path: Path) -> None:
    queues, log = await pair.queues(), tmp_path / "worker.log"
    count = GROUPS * IN_A_GROUP
    for group in range(GROUPS):
        await queues.send(*(request(n) for n in range(group, count, GROUPS)), key=f"group-{group}")
    got: list[Message] = []
    with SlowWorker(queues, log) as first, SlowWorker(queues, log) as second:
        await queues.receive(count // 3, got=got)
        first.kill()
        await queues.receive(count, got=got)
        assert second.stop() == 0, log.read_text()
    got += await queues.receive_some(QUIET)
    assert check_answers(got, range(count)) == 0, "the deduplication id lets no answer through twice"
    order: dict[str | None, list[int]] = defaultdict(list)
    for message in got:
        order[message.ordering_key].append(number(message))
    assert order == {f"group-{group}": [*range(group, count, GROUPS)] for group in range(GROUPS)}
    assert second.events("request_retried")
    assert not await queues.left_over()
