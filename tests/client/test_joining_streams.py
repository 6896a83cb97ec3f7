"""A request that asked for a stream is joined with one response, once one attempt of it is whole."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion

from rejoinder.client.index import Kind
from rejoinder.client.join import Join

ERROR = {"error": {"message": "too hot", "type": "t", "param": None, "code": None}}


def message(
    metadata: Any, index: int, body: Any, *, done: bool = False, attempt: int = 1, chunks: int = 1, status: int = 200
) -> bytes:
    stream = {"index": index, "done": done, "attempt": attempt}
    if chunks != 1:
        stream["chunks"] = chunks
    return json.dumps({"status_code": status, "metadata": metadata, "body": body, "stream": stream}).encode()


def stream(metadata: Any, bodies: Sequence[Any], attempt: int = 1) -> list[bytes]:
    """The messages of an attempt, one chunk in each, the last without one."""
    said = [message(metadata, index, body, attempt=attempt) for index, body in enumerate(bodies)]
    return [*said, message(metadata, len(bodies), None, done=True, attempt=attempt, chunks=0)]


def write(path: Path, lines: Sequence[bytes]) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


class Result:
    """What a join says of some messages to requests whose metadata are `{"id": 0}`, `{"id": 1}`, ..."""

    def __init__(self, tmp_path: Path, requests: int, responses: Sequence[bytes]) -> None:
        asked = [json.dumps({"metadata": {"id": n}, "body": {}}).encode() for n in range(requests)]
        files = write(tmp_path / "requests", asked), write(tmp_path / "responses", responses)
        with Join(*files) as join:
            join.read_requests()
            join.read_responses()
            self.raw = [line.partition(b',"response":')[2][:-1] for line in join.joined()]
            self.texts = {kind: [problem.text for problem in join.problems(kind)] for kind in Kind}
            self.answered, self.missing, self.failed = join.answered, join.missing, join.failed
            self.counts = {kind: number for kind, number in join.counts.items() if number}

    @property
    def bodies(self) -> list[Any]:
        responses = map(json.loads, self.raw)
        return [response and response["body"] for response in responses]


def test_a_whole_stream_is_one_response(tmp_path) -> None:
    result = Result(tmp_path, 1, stream({"id": 0}, ["a", {"b": 1}, [2]]))
    assert result.raw == [b'{"status_code":200,"metadata":{"id": 0},"body":["a",{"b": 1},[2]]}']
    assert result.counts == {}


def test_what_was_said_is_as_it_was(tmp_path) -> None:
    own = b'{ "id":0 }'
    big = b"9" * 5000
    lines = [
        b'{"status_code":200,"metadata":' + own + b',"body": 1.10 ,"stream":{"index":0,"done":false,"attempt":1}}',
        b' {"stream":{"index":1,"done":false,"attempt":1,"chunks":2},"status_code":200,"metadata":'
        + own
        + b',"body":[ "\\u00e9\\"," , '
        + big
        + b"]}",
        b'{"status_code":200,"metadata":' + own + b',"headers":{"A":"b"},"body":[1],'
        b'"stream":{"index":2,"done":true,"attempt":1}}',
    ]
    result = Result(tmp_path, 1, lines)
    body = b'[1.10, "\\u00e9\\"," , ' + big + b",[1]]"
    assert result.raw == [b'{"status_code":200,"metadata":' + own + b',"headers":{"A":"b"},"body":' + body + b"}"]


def test_chunks_of_openai_are_one_completion(tmp_path) -> None:
    def chunk(choices: list[Any], **more: Any) -> dict[str, Any]:
        return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices, **more}

    def delta(content: str, finish: str | None = None) -> dict[str, Any]:
        return {"index": 0, "delta": {"role": "assistant", "content": content}, "finish_reason": finish}

    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    lines = [
        message({"id": 0}, 0, chunk([delta("On")])),
        message({"id": 0}, 1, [chunk([delta("ce")]), chunk([delta(" upon", "stop")])], chunks=2),
        message({"id": 0}, 2, chunk([], usage=usage), done=True),
    ]
    completion = ChatCompletion.model_validate(Result(tmp_path, 1, lines).bodies[0], strict=True)
    assert completion.choices[0].message.content == "Once upon"
    assert completion.usage is not None
    assert completion.usage.total_tokens == 3


@pytest.mark.parametrize("number", ["9" * 5000, "1e400"])
def test_a_number_that_only_text_carries_is_as_it_was(tmp_path, number: str) -> None:
    chunk = f'{{"id":"c","object":"text_completion","choices":[{{"index":0,"text":"a"}}],"n":{number}}}'.encode()
    nested = b"[" * 127 + number.encode() + b"]" * 127
    lines = [
        b'{"status_code":200,"metadata":{"id":%d},"body":%b,"stream":{"index":0,"done":true,"attempt":1}}' % one
        for one in ((0, chunk), (1, b"[" + nested + b"]"))
    ]
    result = Result(tmp_path, 2, lines)
    assert result.counts == {}
    assert [line.partition(b'"body":')[2] for line in result.raw] == [b"[" + chunk + b"]}", b"[[" + nested + b"]]}"]


def test_what_is_missing_of_a_stream_is_told(tmp_path) -> None:
    whole = stream({"id": 0}, list(range(6)))
    lines = [*whole[:2], whole[6], *stream({"id": 1}, "abc", attempt=4)[:3], *stream({"id": 2}, "", attempt=1)]
    result = Result(tmp_path, 4, [*lines, message({"id": 1}, 5, "", attempt=2)])
    assert result.texts[Kind.MISSING] == [
        "request line 1: 3 of 7 messages (attempt 1)",
        "request line 2: no last message, 3 before it (attempt 4)",
        "request line 4: no response",
    ]
    assert result.bodies == [None, None, [], None]
    assert (result.answered, result.missing) == (1, 3)


def test_the_leftovers_of_a_dead_attempt_are_no_conflict(tmp_path) -> None:
    dead, live = stream({"id": 0}, "xyz")[:3], stream({"id": 0}, "abc", attempt=2)
    for lines in ([*dead, *live], [*live, *dead], [*live[:2], *dead, *live[2:]]):
        result = Result(tmp_path, 1, lines)
        assert result.bodies == [["a", "b", "c"]]
        assert (result.answered, result.counts) == (1, {})


def test_an_earlier_attempt_may_be_the_whole_one(tmp_path) -> None:
    result = Result(tmp_path, 1, [*stream({"id": 0}, "abc", attempt=2)[:2], *stream({"id": 0}, "xyz")])
    assert result.bodies == [["x", "y", "z"]]


def test_two_whole_attempts_are_duplicates_or_conflicting(tmp_path) -> None:
    lines = [
        *stream({"id": 0}, "ab"),
        message({"id": 0}, 0, ["a", "b"], done=True, attempt=2, chunks=2),
        *stream({"id": 1}, "ab"),
        *stream({"id": 1}, "xy", attempt=2),
    ]
    result = Result(tmp_path, 2, lines)
    assert result.texts[Kind.DUPLICATE] == ["response line 4: the same answer as line 3, to request line 1"]
    assert result.texts[Kind.CONFLICTING] == ["response line 10: another answer than line 7, to request line 2"]
    assert result.bodies == [["a", "b"], ["a", "b"]]


def test_a_failure_as_last_message_is_a_failure(tmp_path) -> None:
    failure = message({"id": 0}, 2, ERROR, done=True, chunks=0, status=500)
    result = Result(tmp_path, 1, [message({"id": 0}, 0, "a"), failure, message({"id": 0}, 1, "b")])
    assert json.loads(result.raw[0]) == {"status_code": 500, "metadata": {"id": 0}, "body": ERROR}
    assert result.texts[Kind.FAILED] == ["request line 1: status 500 (response line 2): too hot"]
    assert (result.failed, result.counts) == (1, {})


def test_a_success_is_taken_before_a_failure(tmp_path) -> None:
    failure = message({"id": 0}, 0, ERROR, done=True, chunks=0, status=500)
    for lines in ([failure, *stream({"id": 0}, "ab", attempt=2)], [*stream({"id": 0}, "ab", attempt=2), failure]):
        result = Result(tmp_path, 1, lines)
        assert result.bodies == [["a", "b"]]
        assert result.counts == {Kind.CONFLICTING: 1}


def test_a_response_without_stream_is_an_answer(tmp_path) -> None:
    plain = json.dumps({"status_code": 408, "metadata": {"id": 0}, "body": ERROR}).encode()
    result = Result(tmp_path, 1, [*stream({"id": 0}, "ab")[:2], plain])
    assert result.raw == [plain]
    assert (result.failed, result.counts) == (1, {})


def test_a_message_twice_is_a_duplicate(tmp_path) -> None:
    said = stream({"id": 0}, "ab")
    result = Result(tmp_path, 1, [said[0], said[0], said[2], said[1], said[2]])
    assert result.bodies == [["a", "b"]]
    assert result.texts[Kind.DUPLICATE] == [
        "response line 2: the same message as line 1, to request line 1",
        "response line 5: the same message as line 3, to request line 1",
    ]


def test_two_runs_of_one_number_conflict_and_the_later_is_taken(tmp_path) -> None:
    dead, live = stream({"id": 0}, "xyzzy")[:5], stream({"id": 0}, "abc")
    result = Result(tmp_path, 1, [*dead, *live])
    assert result.bodies == [["a", "b", "c"]]
    assert result.texts[Kind.CONFLICTING] == [
        "response line 6: attempt 1 of request line 1 has another message 0, or another last message"
    ]
    same_beginning = [*dead[:1], *stream({"id": 0}, "xbc")[::-1]]
    for lines in (same_beginning, [*dead, *stream({"id": 0}, "xbc")], [*dead, *stream({"id": 0}, "xbc")[::-1]]):
        assert Result(tmp_path, 1, lines).bodies == [["x", "b", "c"]]
    after = Result(tmp_path, 1, [*live, message({"id": 0}, 9, "!"), message({"id": 0}, 1, "!")])
    assert after.bodies == [["a", "b", "c"]]
    assert after.counts == {Kind.CONFLICTING: 2}


@pytest.mark.parametrize(
    ("stream_", "body", "why"),
    [
        ({"index": 0, "done": False}, "a", "stream.attempt is missing"),
        ({"index": -1, "done": False, "attempt": 1}, "a", "stream.index: "),
        ({"index": 0, "done": 1, "attempt": 1}, "a", "stream.done: "),
        ({"index": 0, "done": False, "attempt": 10**30}, "a", "past all bounds"),
        ({"index": 0, "done": False, "attempt": 1, "chunks": 2}, ["a"], "stream.chunks is 2"),
        ("first", "a", "stream is not a JSON object"),
    ],
)
def test_what_is_no_stream_is_malformed(tmp_path, stream_: Any, body: Any, why: str) -> None:
    line = json.dumps({"status_code": 200, "metadata": {"id": 0}, "body": body, "stream": stream_}).encode()
    error = json.dumps({"status_code": 500, "metadata": {"id": 0}, "body": body, "stream": stream_}).encode()
    result = Result(tmp_path, 1, [line, error])
    assert result.counts == {Kind.MALFORMED: 2}
    assert all(why in text and "\n" not in text for text in result.texts[Kind.MALFORMED])


def test_chunks_may_nest_as_requests_may_and_no_deeper(tmp_path) -> None:
    def nested(levels: int) -> Any:
        return json.loads("[" * levels + "]" * levels)

    fits = stream({"id": nested(127)}, [nested(128)])
    requests = write(tmp_path / "requests", [json.dumps({"metadata": {"id": nested(127)}, "body": 1}).encode()])
    with Join(requests, write(tmp_path / "responses", fits)) as join:
        join.read_requests()
        join.read_responses()
        assert [json.loads(line)["response"]["body"] for line in join.joined()] == [[nested(128)]]
    result = Result(tmp_path, 2, [*stream({"id": 0}, [nested(129)]), *stream({"id": 1}, [nested(900)])])
    assert result.counts == {Kind.MALFORMED: 2}
    assert result.texts[Kind.MALFORMED][0] == "response line 1: a chunk nests deeper than 128 levels"


def test_messages_may_come_later(tmp_path) -> None:
    asked = write(tmp_path / "requests", [b'{"metadata": {"id": 0}, "body": 1}'])
    said = stream({"id": 0}, "ab")
    given_ = write(tmp_path / "responses", said[:1])
    with Join(asked, given_) as join:
        join.read_requests()
        for line in said[1:]:
            join.read_responses()
            assert join.missing == 1
            with given_.open("ab") as file:
                file.write(line + b"\n")
        join.read_responses()
        assert join.missing == 0


changing = st.randoms(use_true_random=False)
chunked = st.lists(st.lists(st.text(max_size=2), max_size=3), max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(st.lists(st.tuples(chunked, chunked, st.integers(0, 3)), min_size=1, max_size=3), changing)
def test_any_grouping_order_and_duplication_says_the_same(tmp_path, asked: list[Any], chance: random.Random) -> None:
    lines: list[bytes] = []
    for number, (whole, dead, lost) in enumerate(asked):
        for attempt, groups in ((1, dead), (2, whole)):
            said = [
                message({"id": number}, at, g[0] if len(g) == 1 else g, attempt=attempt, chunks=len(g))
                for at, g in enumerate(groups)
            ]
            if attempt == 2:
                said.append(message({"id": number}, len(groups), None, done=True, attempt=2, chunks=0))
            lines += said[:-lost] if lost and attempt == 1 else said
    lines += chance.sample(lines, chance.randint(0, len(lines)))
    chance.shuffle(lines)
    result = Result(tmp_path, len(asked), lines)
    assert result.bodies == [[chunk for group in whole for chunk in group] for whole, _, _ in asked]
    assert set(result.counts) <= {Kind.DUPLICATE}
    assert result.missing == 0
