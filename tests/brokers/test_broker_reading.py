"""Streams read from the brokers that keep them in order, and from those that do not."""

import json
from pathlib import Path

from broker_pairs import Pair, on
from worker_process import WorkerProcess

from rejoinder.client.streams import Answered, Chunks, streamed

STREAMS = 4


@on("fifo", "ordered", "sqs>pubsub")
async def test_streams_are_read_whole(pair: Pair, tmp_path: Path) -> None:
    queues = await pair.queues()
    bodies = [[f"{n}-{place}" for place in range(32)] for n in range(STREAMS)]
    requests = [
        json.dumps({"path": "/echo", "metadata": {"n": n}, "body": body, "options": {"stream": True}}).encode()
        for n, body in enumerate(bodies)
    ]
    shown: list[list[str]] = [[] for _ in bodies]
    answers: list[list[str] | None] = [None for _ in bodies]
    # A message of a FIFO group comes only when those before it are acked: the reader must ack before a stream is whole.
    with WorkerProcess(queues, tmp_path / "log", "--stream-interval-ms", "0", "--stream-max-bytes", "60"):
        await queues.send(*requests, key="all")
        async for event in streamed(queues.inbox, count=STREAMS, idle=60):
            assert isinstance(event, Chunks | Answered)
            n = (event.metadata or {})["n"]
            if isinstance(event, Chunks):
                shown[n] += event.chunks
            else:
                answers[n] = event.response.body  # type: ignore[assignment]  # a list, as the request's own
    assert shown == answers == bodies
