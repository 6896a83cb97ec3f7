"""Each response to its request."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rejoinder.client.index import Kind
from rejoinder.client.join import Join


def write(path: Path, values: list[Any]) -> Path:
    lines = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in values]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def request(metadata: Any, body: Any = "?") -> dict[str, Any]:
    return {"metadata": metadata, "body": body}


def response(metadata: Any, body: Any = "!", status: int = 200) -> dict[str, Any]:
    return {"status_code": status, "metadata": metadata, "body": body}


def error(metadata: Any, status: int = 400) -> dict[str, Any]:
    return response(metadata, {"error": {"message": "too hot", "type": "t", "param": None, "code": None}}, status)


class Result:
    """What a join of these requests and responses says."""

    def __init__(self, tmp_path: Path, requests: list[Any], responses: list[Any], on: tuple[str, ...] = ()) -> None:
        files = write(tmp_path / "requests", requests), write(tmp_path / "responses", responses)
        with Join(*files, on) as join:
            join.read_requests()
            join.read_responses()
            self.raw = list(join.joined())
            self.lines = [json.loads(line) for line in self.raw]
            self.problems = {kind: list(join.problems(kind)) for kind in Kind}
            self.requests, self.answered = join.requests, join.answered
            self.counts = join.counts | Counter({Kind.MISSING: join.missing, Kind.FAILED: join.failed})
        assert {kind: len(problems) for kind, problems in self.problems.items()} == {
            kind: self.counts[kind] for kind in Kind
        }

    def at(self, kind: Kind) -> list[int]:
        return [problem.line for problem in self.problems[kind]]

    @property
    def answers(self) -> list[Any]:
        return [line["response"] and line["response"]["body"] for line in self.lines]


def test_joins_in_the_order_of_the_requests(tmp_path) -> None:
    metadata = [{"doc": n, "run": "x"} for n in range(100)]
    responses = [response(dict(reversed(own.items())), own["doc"]) for own in metadata]
    random.Random(1).shuffle(responses)
    result = Result(tmp_path, [request(own) for own in metadata], responses)
    assert result.answers == list(range(100))
    assert result.answered == 100
    assert not any(result.counts.values())


def test_the_lines_are_spliced_as_they_are(tmp_path) -> None:
    mine = b'{"metadata" : {"n": 1.10, "big": 123456789012345678901234567890, "u": "\\u00e9"}, "body":1E2}'
    theirs = (
        b' {"status_code":200,"metadata":{"u":"\xc3\xa9","big":123456789012345678901234567890,"n":1.1},"body":0.10}'
    )
    result = Result(tmp_path, [mine], [theirs + b"\r"])
    assert result.raw == [b'{"request":' + mine + b',"response":' + theirs + b"}"]


def test_integers_are_exact_and_types_differ(tmp_path) -> None:
    ids: list[Any] = [2**53, 2**53 + 1, 1, 1.0, True, "1", None]
    result = Result(tmp_path, [request({"id": own}) for own in ids], [response({"id": own}, repr(own)) for own in ids])
    assert result.answers == list(map(repr, ids))
    assert not any(result.counts.values())


def test_missing_and_unmatched(tmp_path) -> None:
    result = Result(
        tmp_path,
        [request({"id": 1}), request({"id": 2}), request({"id": 3})],
        [response({"id": 2}), response({"id": 9}), response(None)],
    )
    assert [line["response"] is None for line in result.lines] == [True, False, True]
    assert result.at(Kind.MISSING) == [1, 3]
    assert result.at(Kind.UNMATCHED) == [2, 3]
    assert result.answered == 1


def test_duplicate_is_the_same_said_again(tmp_path) -> None:
    again = b'{"body": {"x": 1, "y": 2}, "metadata": {"id": 1}, "status_code": 200}'
    result = Result(tmp_path, [request({"id": 1})], [response({"id": 1}, {"y": 2, "x": 1}), again, again])
    assert result.at(Kind.DUPLICATE) == [2, 3]
    assert result.counts[Kind.CONFLICTING] == 0
    assert result.problems[Kind.DUPLICATE][0].text == ("response line 2: the same answer as line 1, to request line 1")


def test_conflicting_is_something_else(tmp_path) -> None:
    result = Result(
        tmp_path,
        [request({"id": 1}), request({"id": 2}), request({"id": 3})],
        [
            response({"id": 1}, "first"),
            response({"id": 1}, "second"),
            error({"id": 2}, 500),
            response({"id": 2}, "after all"),
            response({"id": 3}, 1),
            response({"id": 3}, 1.0),
        ],
    )
    assert result.at(Kind.CONFLICTING) == [2, 4, 6]
    assert result.answers == ["first", "after all", 1]
    assert result.counts[Kind.FAILED] == 0


def test_failed_says_why(tmp_path) -> None:
    result = Result(tmp_path, [request({"id": 1}), request({"id": 2})], [response({"id": 2}), error({"id": 1})])
    assert [problem.text for problem in result.problems[Kind.FAILED]] == [
        "request line 1: status 400 (response line 2): too hot"
    ]
    assert result.answered == 2


def test_requests_with_the_same_metadata_are_ambiguous(tmp_path) -> None:
    result = Result(tmp_path, [request({"id": 1}), request({"id": 1}, "else")], [response({"id": 1}, "a")])
    assert result.at(Kind.AMBIGUOUS) == [2]
    assert result.answers == ["a", None]
    assert result.requests == 2
    assert result.counts[Kind.MISSING] == 0


def test_malformed_lines_are_left_out_and_counted(tmp_path) -> None:
    result = Result(
        tmp_path,
        [b"nope", request({"id": 1}), [1], {"body": 1}, b"\xff", b"", request("x"), request({"id": 2})],
        [b"{", 7, {"metadata": {}}, response({}, status=True), {"status_code": 200}, response({"id": 2})]
        + [response({"id": 1}, status=status) for status in (99, 600, 10**30, -(10**30))],
    )
    assert result.at(Kind.MALFORMED) == [1, 3, 4, 5, 7, 1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert result.answers == [None, "!"]
    assert result.at(Kind.MISSING) == [2]


def test_on_joins_by_some_keys(tmp_path) -> None:
    result = Result(
        tmp_path,
        [request({"id": 1, "doc": {"n": 5}}), request({"id": 2}), request({"id": 3, "doc": {"n": 5}, "x": 0})],
        [response({"id": 1, "added": True, "doc": {"n": 5}}, "one"), response({"id": 1})],
        on=("id", "doc.n"),
    )
    assert result.answers == ["one", None]
    assert result.problems[Kind.MALFORMED][0].text == "request line 2: metadata has no 'doc.n'"
    assert result.at(Kind.UNMATCHED) == [2]
    assert result.at(Kind.MISSING) == [3]


def test_responses_may_come_later(tmp_path) -> None:
    requests = write(tmp_path / "requests", [request({"id": number}) for number in range(4)])
    responses = write(tmp_path / "responses", [response({"id": 2})])
    with Join(requests, responses) as join:
        join.read_requests()
        join.read_responses()
        assert join.missing == 3
        with responses.open("ab") as file:
            for number in (0, 2, 3):
                file.write(json.dumps(response({"id": number}, number)).encode() + b"\n")
        join.read_responses()
        assert join.missing == 1
        assert join.counts[Kind.DUPLICATE] + join.counts[Kind.CONFLICTING] == 1
        assert next(iter(join.problems(Kind.CONFLICTING))).line == 3
        assert [json.loads(line)["response"] is None for line in join.joined()] == [False, True, False, False]


small = st.integers(0, 6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    st.lists(small, max_size=8),
    st.lists(st.tuples(small, st.integers(0, 2), st.sampled_from([200, 500])), max_size=16),
)
def test_agrees_with_the_obvious_join(tmp_path, asked: list[int], given_: list[tuple[int, int, int]]) -> None:
    result = Result(
        tmp_path, [request({"id": own}) for own in asked], [response({"id": own}, body, s) for own, body, s in given_]
    )
    expected: list[Any] = []
    for at, own in enumerate(asked):
        mine = [(body, status) for key, body, status in given_ if key == own and own not in asked[:at]]
        expected.append(next((body for body, status in mine if status < 400), mine[0][0] if mine else None))
    assert result.answers == expected
    assert result.counts[Kind.UNMATCHED] == sum(own not in asked for own, _, _ in given_)
    assert result.counts[Kind.AMBIGUOUS] == len(asked) - len(set(asked))
    answered = set(asked) & {own for own, _, _ in given_}
    assert result.answered == len(answered)
    assert result.counts[Kind.MISSING] == len(set(asked)) - len(answered)
    matched = sum(own in asked for own, _, _ in given_)
    assert result.counts[Kind.DUPLICATE] + result.counts[Kind.CONFLICTING] == matched - len(answered)


def test_a_directory_is_no_file(tmp_path) -> None:
    with pytest.raises(IsADirectoryError), Join(tmp_path, tmp_path):
        pass
