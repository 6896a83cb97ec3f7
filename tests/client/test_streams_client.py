"""Streams put together as their messages come."""

import json
import random
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rejoinder.adapters import Backlog, Outgoing, open_subscription, open_topic
from rejoinder.client.consume import Received
from rejoinder.client.streams import (
    ATTEMPT_BYTES,
    OVERHEAD_BYTES,
    Answered,
    Chunks,
    Event,
    Forgotten,
    Name,
    Restarted,
    Streams,
    Unreadable,
    streamed,
)

ERROR = {"error": {"message": "too hot", "type": "t", "param": None, "code": None}}


def message(
    request: int, index: int, chunks: Sequence[Any], *, done: bool = False, attempt: int = 1, status: int = 200
) -> Received:
    """A message of the stream that answers a request; an error is its body itself."""
    stream = {"index": index, "done": done, "attempt": attempt, "chunks": len(chunks)}
    body = ERROR if status >= 400 else chunks[0] if len(chunks) == 1 else list(chunks) or None
    return received(request, {"status_code": status, "metadata": {"n": request}, "body": body, "stream": stream})


def received(request: int, response: Any) -> Received:
    attributes = {"response_id": f"r{request}", "request_message_id": f"m{request}"}
    return Received("id", json.dumps(response).encode(), attributes)


def whole(request: int, groups: Sequence[Sequence[Any]], attempt: int = 1) -> list[Received]:
    last = len(groups) - 1
    return [message(request, index, group, done=index == last, attempt=attempt) for index, group in enumerate(groups)]


def fed(streams: Streams, messages: Sequence[Received]) -> list[Event]:
    return [event for one in messages for event in streams.feed(one)]


def told(events: Sequence[Event]) -> list[Any]:
    """The events in short."""
    short: list[Any] = []
    for event in events:
        if isinstance(event, Chunks):
            short.append((event.attempt, event.chunks))
        elif isinstance(event, Restarted):
            short.append(("again", event.attempt))
        elif isinstance(event, Answered):
            short.append((event.attempt, event.response.status_code, event.response.body))
        else:
            short.append(event)
    return short


def test_chunks_are_given_as_soon_as_they_are_next() -> None:
    streams = Streams()
    first, second, third, last = whole(0, [["a"], ["b", "c"], ["d"], []])
    assert told(streams.feed(second)) == []
    assert told(streams.feed(first)) == [(1, ["a"]), (1, ["b", "c"])]
    assert told(streams.feed(first)) == []
    assert told(streams.feed(last)) == []
    assert told(streams.feed(third)) == [(1, ["d"]), (1, 200, ["a", "b", "c", "d"])]
    assert streams.held == 0
    assert told(streams.feed(third)) == []
    assert streams.held == 0


def test_events_name_their_request() -> None:
    (chunks, answered) = fed(Streams(), whole(7, [["a"]]))
    assert isinstance(chunks, Chunks)
    assert isinstance(answered, Answered)
    for event in (chunks, answered):
        assert event.name == Name("r7", "m7")
        assert event.metadata == {"n": 7}
    assert answered.response.stream is None


def test_streams_of_several_requests_do_not_mix() -> None:
    one, other = whole(0, [["a"], ["b"]]), whole(1, [["x"], ["y"]])
    events = fed(Streams(), [one[0], other[0], other[1], one[1]])
    assert told(events) == [(1, ["a"]), (1, ["x"]), (1, ["y"]), (1, 200, ["x", "y"]), (1, ["b"]), (1, 200, ["a", "b"])]


def test_a_shared_inference_id_is_not_a_shared_stream() -> None:
    body = whole(0, [["a"], ["b"]])[0].body
    streams = Streams()
    for request in ("m1", "m2"):
        attributes = {"response_id": "same", "request_message_id": request}
        assert len(streams.feed(Received("id", body, attributes))) == 1


def test_without_attributes_the_metadata_tells() -> None:
    streams = Streams()
    bare = [Received("id", one.body, {}) for one in (*whole(0, [["a"], ["b"]]), *whole(1, [["x"], ["y"]]))]
    assert [event.response.body for event in fed(streams, bare) if isinstance(event, Answered)] == [
        ["a", "b"],
        ["x", "y"],
    ]


def test_a_later_attempt_replaces_an_earlier_one() -> None:
    dead, live = whole(0, [["a"], ["b"], ["c"]]), whole(0, [["x"], ["y"]], attempt=5)
    events = fed(Streams(), [dead[0], live[1], dead[1], live[0]])
    assert told(events) == [
        (1, ["a"]),
        (1, ["b"]),
        ("again", 5),
        (5, ["x"]),
        (5, ["y"]),
        (5, 200, ["x", "y"]),
    ]


def test_an_earlier_attempt_that_gets_whole_is_the_answer() -> None:
    early, late = whole(0, [["a"], ["b"]]), whole(0, [["x"], ["y"]], attempt=2)
    streams = Streams()
    events = fed(streams, [early[0], late[0], early[1], late[1]])
    assert told(events) == [
        (1, ["a"]),
        ("again", 2),
        (2, ["x"]),
        ("again", 1),
        (1, ["a"]),
        (1, ["b"]),
        (1, 200, ["a", "b"]),
    ]
    assert streams.held == 0


def test_a_failure_ends_a_stream_whatever_is_missing_of_it() -> None:
    streams = Streams()
    failure = message(0, 3, [], done=True, status=500)
    assert told(fed(streams, [message(0, 0, ["a"]), failure, message(0, 1, ["b"])])) == [
        (1, ["a"]),
        (1, 500, ERROR),
    ]
    assert streams.held == 0


def test_a_response_that_is_no_stream_is_an_answer() -> None:
    streams = Streams()
    plain = received(0, {"status_code": 408, "metadata": {"n": 0}, "body": ERROR})
    assert told(fed(streams, [message(0, 0, ["a"]), plain, plain, message(0, 1, ["b"], done=True)])) == [
        (1, ["a"]),
        (None, 408, ERROR),
    ]
    assert streams.held == 0


def test_two_runs_of_one_number_are_told_apart() -> None:
    dead = [message(0, index, [letter]) for index, letter in enumerate("xyzz")]
    live = whole(0, [["a"], ["y"], ["c"]])
    streams = Streams()
    assert told(fed(streams, [*dead, live[1], live[2], live[0]]))[4:] == [
        ("again", 1),
        (1, ["a"]),
        (1, ["y"]),
        (1, ["c"]),
        (1, 200, ["a", "y", "c"]),
    ]
    assert streams.held == 0


def test_past_the_limit_the_longest_silent_is_forgotten() -> None:
    size = len(message(0, 0, ["a"]).body) + OVERHEAD_BYTES
    streams = Streams(held_bytes=2 * (size + ATTEMPT_BYTES))
    events = fed(streams, [message(0, 0, ["a"]), message(1, 0, ["a"]), message(0, 1, ["b"])])
    assert told(events) == [(1, ["a"]), (1, ["a"]), (1, ["b"]), Forgotten(Name("r1", "m1"), 1)]
    assert streams.held == 2 * size + ATTEMPT_BYTES
    assert streams.feed(message(1, 1, ["b"], done=True)) == [], "its beginning is not there any more"
    assert told(fed(streams, whole(0, [["a"], ["b"], ["c"]])[2:])) == [(1, ["c"]), (1, 200, ["a", "b", "c"])]
    again = fed(streams, whole(1, [["x"], ["y"]], attempt=2))
    assert told(again) == [(2, ["x"]), (2, ["y"]), (2, 200, ["x", "y"])]


def test_memory_is_bounded_whatever_comes() -> None:
    streams = Streams(held_bytes=50_000, remembered=100)
    for request in range(2_000):
        streams.feed(message(request, 1, ["never whole" * 10]))
        assert streams.held <= 50_000
    assert len(streams._settled) <= 100
    assert len(streams._open) <= 50_000 // ATTEMPT_BYTES


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (b"{", "it is not JSON: "),
        (b"[]", "it should be a JSON object"),
        (b'{"status_code":200}', "metadata is missing"),
        (b'{"status_code":200,"metadata":{},"stream":{"index":0,"done":false}}', "stream.attempt is missing"),
        (
            b'{"status_code":200,"metadata":{},"body":[1],"stream":{"index":0,"done":false,"attempt":1,"chunks":2}}',
            "stream.chunks is 2, but the body is not a list of so many",
        ),
    ],
)
def test_what_is_no_response_is_told_and_harms_nothing(response: bytes, why: str) -> None:
    streams = Streams()
    (event,) = streams.feed(Received("id", response, {}))
    assert isinstance(event, Unreadable)
    assert event.received.body == response
    assert why in event.reason
    assert streams.held == 0


def test_halves_of_characters_are_carried() -> None:
    streams = Streams()
    metadata = {"n\ud800": ["\udfff"]}
    messages = [
        received(1, {"status_code": 200, "metadata": metadata, "body": body, "stream": stream})
        for body, stream in (
            ("\ud83d", {"index": 1, "done": False, "attempt": 1}),
            ("\ude00", {"index": 2, "done": True, "attempt": 1}),
            ("a", {"index": 0, "done": False, "attempt": 1}),
        )
    ]
    assert told(fed(streams, messages)) == [
        (1, ["a"]),
        (1, ["\ud83d"]),
        (1, ["\ude00"]),
        (1, 200, ["a", "\ud83d", "\ude00"]),
    ]
    (event,) = streams.feed(received(2, {"status_code": 200, "metadata": metadata, "body": "\ud800"}))
    assert isinstance(event, Answered)
    assert event.metadata == event.response.metadata == metadata
    (event,) = streams.feed(received(3, {"status_code": 20, "metadata": {}, "body": "\ud800"}))
    assert isinstance(event, Unreadable)
    assert "status_code" in event.reason
    (event,) = streams.feed(received(4, {"status_code": 200, "body": "\ud800"}))
    assert isinstance(event, Unreadable)
    assert "metadata is missing" in event.reason


groups = st.lists(st.lists(st.text(max_size=1), max_size=3), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(groups, groups), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_any_grouping_order_and_duplication_says_the_same(asked: list[Any], chance: random.Random) -> None:
    messages: list[Received] = []
    for request, (dead, live) in enumerate(asked):
        messages += whole(request, dead)[:-1] + whole(request, live, attempt=2)
    messages += chance.sample(messages, chance.randint(0, len(messages)))
    chance.shuffle(messages)
    streams = Streams()
    shown: dict[Name, list[Any]] = {}
    answers: dict[Name, Any] = {}
    for event in fed(streams, messages):
        assert not isinstance(event, Unreadable | Forgotten)
        assert event.name not in answers, "nothing comes after an answer"
        if isinstance(event, Chunks):
            shown.setdefault(event.name, []).extend(event.chunks)
        elif isinstance(event, Restarted):
            shown[event.name] = []
        else:
            answers[event.name] = event.response.body
            assert event.attempt == 2
            assert event.response.body == shown.get(event.name, []), "what was shown is what was answered"
    expected = {Name(f"r{n}", f"m{n}"): [c for group in live for c in group] for n, (_, live) in enumerate(asked)}
    assert answers == expected
    assert streams.held == 0


@pytest.fixture
def url(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/work.db?queue=responses"


async def put(url: str, messages: Sequence[Received]) -> None:
    async with open_topic(url) as topic:
        outcomes = await topic.publish([Outgoing(one.body, one.attributes) for one in messages])
        assert all(isinstance(outcome, str) for outcome in outcomes)


async def backlog(url: str) -> Backlog:
    async with open_subscription(url) as subscription:
        return await subscription.backlog()


async def test_streamed_ends_with_the_last_answer_and_leaves_the_rest(url) -> None:
    await put(url, [*whole(0, [["a"], ["b"]]), *whole(1, [["x"], ["y"]])])
    events = [event async for event in streamed(url, count=1)]
    assert told(events) == [(1, ["a"]), (1, ["b"]), (1, 200, ["a", "b"])]
    assert await backlog(url) == Backlog(waiting=2, held=0, dead=None), "acked what was read, let go of the rest"
    assert [event async for event in streamed(url, count=0)] == []
    assert told([event async for event in streamed(url, idle=0.05)])[-1] == (1, 200, ["x", "y"])
    assert await backlog(url) == Backlog(waiting=0, held=0, dead=None)


async def test_streamed_ends_when_its_reader_has_what_it_wants_and_acks_that(url) -> None:
    await put(url, [*whole(0, [["a"]]), *whole(1, [["x"], ["y"]]), *whole(2, [["z"]])])
    taken = []
    async with aclosing(streamed(url, until=lambda: told(taken)[-1:] == [(1, 200, ["x", "y"])])) as events:
        async for event in events:
            taken.append(event)  # noqa: PERF401  # `until` looks at it between
    assert told(taken) == [(1, ["a"]), (1, 200, ["a"]), (1, ["x"]), (1, ["y"]), (1, 200, ["x", "y"])]
    assert await backlog(url) == Backlog(waiting=1, held=0, dead=None)


async def test_what_a_reader_breaks_off_at_comes_again(url) -> None:
    await put(url, whole(0, [["a"], ["b"], ["c"]]))
    streams = Streams()
    async with aclosing(streamed(url, streams=streams)) as events:
        async for event in events:
            if told([event]) == [(1, ["b"])]:
                break
    assert await backlog(url) == Backlog(waiting=2, held=0, dead=None)
    rest = [event async for event in streamed(url, count=1, streams=streams)]
    assert told(rest) == [(1, ["c"]), (1, 200, ["a", "b", "c"])]
