"""Numbered requests, and what must be true of their answers whatever happened to the workers."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rejoinder.adapters import Message


def envelopes(count: int, **body: Any) -> list[bytes]:
    return [
        json.dumps({"path": "/echo", "metadata": {"id": n}, "body": {"prompt": f"p{n}", **body}}).encode()
        for n in range(count)
    ]


def number(message: Message) -> int:
    """Which request it answers."""
    return int(json.loads(message.body)["metadata"]["id"])


def check_answers(messages: Sequence[Message], expected: Iterable[int]) -> int:
    """Each request is answered with 200, none with two bodies; returns how many answers came again."""
    bodies: dict[int, set[bytes]] = defaultdict(set)
    ids: dict[int, set[str]] = defaultdict(set)
    for message in messages:
        assert json.loads(message.body)["status_code"] == 200, message
        bodies[number(message)].add(message.body)
        ids[number(message)].add(message.attributes["response_id"])
    assert set(bodies) == set(expected)
    assert all(len(found) == 1 for found in bodies.values()), bodies
    assert all(len(found) == 1 for found in ids.values()), ids
    return len(messages) - len(bodies)
