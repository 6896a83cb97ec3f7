"""Streams of real workers on every broker: complete, in order, and told apart from what a killed worker began."""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from broker_pairs import Pair, on
from pairs import LIMIT, QUIET, Queues, sqlite
from worker_process import SlowWorker, WorkerProcess

from rejoinder.adapters import Message, open_subscription

STREAMS = 6
CHUNKS = 40
Attempts = dict[int, list[dict[str, Any]]]


def request(n: int, body: Any) -> bytes:
    envelope = {"path": "/echo", "metadata": {"id": n}, "body": body, "options": {"stream": True}}
    return json.dumps(envelope).encode()


async def until_done(queues: Queues, count: int, got: list[Message]) -> list[Message]:
    """Receive until so many streams have had their last message."""
    deadline = time.monotonic() + LIMIT
    async with open_subscription(queues.inbox) as subscription:
        while len({number(one) for one in got if stream_of(one)["done"]}) < count:
            assert time.monotonic() < deadline, [(number(one), stream_of(one)) for one in got]
            got += await received(subscription)
    return got


async def received(subscription: Any) -> list[Message]:
    messages: list[Message] = await subscription.receive(100, 2.0)
    await subscription.ack(messages)
    return messages


def stream_of(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(message.body)["stream"]
    return found


def number(message: Message) -> int:
    return int(json.loads(message.body)["metadata"]["id"])


def by_request(got: list[Message]) -> dict[int, Attempts]:
    """The attempts of each request, each with its messages as they came, a repeated one left out."""
    found: dict[int, Attempts] = defaultdict(lambda: defaultdict(list))
    for message in got:
        response, stream = json.loads(message.body), stream_of(message)
        assert response["status_code"] == 200, response
        attempt = found[number(message)][stream["attempt"]]
        if response not in attempt:
            attempt.append(response)
    return found


def said(responses: list[dict[str, Any]]) -> list[Any]:
    """The chunks of one attempt in the order of their index."""
    chunks: list[Any] = []
    for response in sorted(responses, key=lambda one: int(one["stream"]["index"]))[:-1]:
        chunks += response["body"] if response["stream"].get("chunks", 1) > 1 else [response["body"]]
    return chunks


def is_whole(responses: list[dict[str, Any]]) -> bool:
    indices = sorted(one["stream"]["index"] for one in responses)
    return indices == [*range(len(responses))] and any(one["stream"]["done"] for one in responses)


def check_order(found: dict[int, Attempts]) -> None:
    for attempts in found.values():
        assert [*attempts] == sorted(attempts), "a later attempt comes later"
        for responses in attempts.values():
            indices = [one["stream"]["index"] for one in responses]
            assert indices == sorted(indices)


async def echo(queues: Queues, log: Path, key: str | None, *, ordered: bool) -> None:
    bodies = [[f"{n}-{place}" for place in range(32)] for n in range(STREAMS)]
    with WorkerProcess(queues, log, "--stream-interval-ms", "0", "--stream-max-bytes", "60") as worker:
        await queues.send(*(request(n, body) for n, body in enumerate(bodies)), key=key)
        got = await until_done(queues, STREAMS, [])
        assert worker.stop() == 0, log.read_text()
    found = by_request(got)
    if ordered:  # else the index alone says the order
        check_order(found)
    for n, body in enumerate(bodies):
        ((_, responses),) = found[n].items()
        assert is_whole(responses)
        assert len(responses) >= 5
        assert said(responses) == body
    assert key is None or {message.ordering_key for message in got} == {key}
    assert not await queues.left_over()


async def killed(queues: Queues, log: Path, *, counts: bool, groups: int = 3) -> None:
    for group in range(groups):
        asked = [request(n, {"chunks": CHUNKS}) for n in range(group, STREAMS, groups)]
        await queues.send(*asked, key=f"group-{group}")
    got: list[Message] = []
    with SlowWorker(queues, log, seconds=0.2, stream_interval_ms=20) as first:
        async with open_subscription(queues.inbox) as subscription:
            while len(got) < 5:
                got += await received(subscription)
        first.kill()
    with SlowWorker(queues, log, seconds=0.005, stream_interval_ms=20) as second:
        await until_done(queues, STREAMS, got)
        assert second.stop() == 0, log.read_text()
    got += await queues.receive_some(QUIET)
    found = by_request(got)
    assert set(found) == set(range(STREAMS))
    check_order(found)
    begun_again = 0
    for attempts in found.values():
        *begun, last = attempts
        assert is_whole(attempts[last])
        assert said(attempts[last]) == [*range(CHUNKS)]
        begun_again += len(begun)
        for attempt in begun:
            if not is_whole(attempts[attempt]):
                chunks = said([*attempts[attempt], attempts[last][-1]])
                assert chunks == [*range(len(chunks))], "what came of it is its beginning"
        if counts:
            assert max(attempts) <= 3
    assert begun_again, "nothing was under way when the worker was killed"
    ids = {(number(message), message.attributes["response_id"]) for message in got}
    assert len(ids) == STREAMS, "the response id is the same on every attempt"
    assert not await queues.left_over()


async def test_streams_on_sqlite(tmp_path: Path) -> None:
    await echo(sqlite(tmp_path, 2.0), tmp_path / "log", None, ordered=True)


@on("fifo", "ordered", "sns", "sqs>pubsub")
async def test_streams_on_brokers(pair: Pair, tmp_path: Path) -> None:
    ordered = pair.name in {"fifo", "ordered"}
    await echo(await pair.queues(), tmp_path / "log", "all" if ordered else None, ordered=ordered)


async def test_a_stream_of_a_killed_worker_on_sqlite(tmp_path: Path) -> None:
    await killed(sqlite(tmp_path, 5.0), tmp_path / "log", counts=True)


@on("fifo", "ordered")
async def test_a_stream_of_a_killed_worker(pair: Pair, tmp_path: Path) -> None:
    await killed(await pair.queues(5.0 if pair.name == "fifo" else None), tmp_path / "log", counts=pair.name == "fifo")
