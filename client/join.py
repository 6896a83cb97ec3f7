"""Put each response to its request: two files of JSON lines become one, in the order of the requests.

However many lines there are, memory holds one of each file and a page cache. `rejoinder.client.keys` says when two
metadata are the same. Where a request got several responses, its answer is the first that succeeded, else the first.
A stream is one response, once one of its attempts is whole; `rejoinder.client.parts` keeps its messages until then.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from rejoinder.client.index import Answer, Index, Kind, Part, Problem
from rejoinder.client.keys import Malformed, canonical, key_of, read_json
from rejoinder.client.lines import Line, lines_from, strip
from rejoinder.client.parts import Parts
from rejoinder.client.whole import stream_of, whole_response
from rejoinder.schemas.envelope import Stream

Lines = Iterator[tuple[Line, int]]
Watch = Callable[[str, Lines], Lines]
"""Given what is being done and the lines that go by; returns the same lines."""


def _unwatched(_doing: str, lines: Lines) -> Lines:
    return lines


class Join:
    """One join. A context manager: `read_requests`, `read_responses`, then `joined` and what the counts say."""

    def __init__(self, requests: Path, responses: Path, on: Sequence[str] = (), watch: Watch = _unwatched) -> None:
        """Name the two files.

        Args:
            requests: JSON lines of requests.
            responses: JSON lines of responses. May grow between calls of `read_responses`, by whole lines.
            on: Paths in metadata to join by, such as `id` or `document.id`. Default: the whole metadata.
            watch: Sees the lines go by.
        """
        self._paths = requests, responses
        self._on = on
        self._watch = watch
        self._index = Index()
        self._parts = Parts(self._index)
        self._stack = ExitStack()
        self._response_lines = 0
        self.requests = 0
        """Lines that are requests, ambiguous ones among them."""
        self.counts: Counter[Kind] = Counter()
        """What was wrong, without missing and failed, which `joined` and time still change."""
        self.answered = 0

    def __enter__(self) -> Self:
        opened = [self._stack.enter_context(path.open("rb")) for path in (*self._paths, self._paths[1])]
        self._requests, self._responses, self._picked = opened
        self._stack.callback(self._index.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def missing(self) -> int:
        """Requests without an answer. What is ambiguous is counted apart."""
        return self.requests - self.counts[Kind.AMBIGUOUS] - self.answered

    @property
    def failed(self) -> int:
        """Requests whose answer has a status code of 400 or more."""
        return sum(1 for _ in self._index.failed())

    def read_requests(self) -> None:
        """Read all requests, once, before any response.

        Raises:
            OSError: the file cannot be read.
        """
        for line, _ in self._watch("reading requests", lines_from(self._requests)):
            try:
                key = key_of(_metadata(line), self._on)
            except ValueError as exc:
                self._note(Kind.MALFORMED, line.number, f"request line {line.number}: {exc}", not_joined=True)
                continue
            self.requests += 1
            first = self._index.add_request(key, line.number)
            if first != line.number:
                text = f"request line {line.number}: the same metadata as line {first}"
                self._note(Kind.AMBIGUOUS, line.number, text)

    def read_responses(self) -> None:
        """Read the responses that the file has, from where the call before this stopped.

        Raises:
            OSError: the file cannot be read.
        """
        for line, offset in self._watch("reading responses", lines_from(self._responses, self._response_lines)):
            self._response_lines = line.number
            try:
                response = _response(line)
                stream = stream_of(response, line.data)
            except ValueError as exc:
                self._note(Kind.MALFORMED, line.number, f"response line {line.number}: {exc}")
                continue
            request = self._request_of(response["metadata"])
            if request is None:
                self._note(Kind.UNMATCHED, line.number, f"response line {line.number}: no request has its metadata")
                continue
            answer = Answer(request, line.number, offset, response["status_code"])
            if stream is not None:
                self._take_part(answer, stream, line)
            else:
                self._settle(answer)

    def joined(self) -> Iterator[bytes]:
        """`{"request":...,"response":...}` for each request in order, without a newline; null where it got none.

        Both are the text of their lines, so that nothing in them changes. What is no request is left out.
        """
        answers, malformed = self._index.answers(), self._index.malformed_requests()
        answer, skipped = next(answers, None), next(malformed, None)
        self._requests.seek(0)
        for line, _ in self._watch("joining", lines_from(self._requests)):
            if line.number == skipped:
                skipped = next(malformed, None)
                continue
            response = b"null"
            if answer is not None and answer.request == line.number:
                response = self._pick(answer)
                answer = next(answers, None)
            yield b'{"request":%b,"response":%b}' % (line.data, response)

    def answers(self) -> Iterator[Answer]:
        """Which response each request got, in the order of the requests."""
        return self._index.answers()

    def problems(self, kind: Kind) -> Iterator[Problem]:
        """The lines of one kind, in the order of their file."""
        if kind is Kind.MISSING:
            missing = self._index.missing()
            return (Problem(line, f"request line {line}: {self._parts.missing_of(line)}") for line in missing)
        if kind is Kind.FAILED:
            return map(self._failure, self._index.failed())
        return self._index.problems(kind)

    def _request_of(self, metadata: Any) -> int | None:
        try:
            return self._index.request_of(key_of(metadata, self._on))
        except ValueError:  # without the keys to join by, or nested past all bounds: it is nobody's answer
            return None

    def _take_part(self, answer: Answer, stream: Stream, line: Line) -> None:
        """Take a message of a stream, which `answer` would be if it were a whole response."""
        part = Part(answer.request, stream.attempt, stream.index, answer.line, answer.offset)
        old = self._index.part_at(part.request, part.attempt, part.place)
        if old is not None and _same(_line_at(self._picked, old), line.data):
            text = f"response line {part.line}: the same message as line {old.line}, to request line {part.request}"
            self._note(Kind.DUPLICATE, part.line, text)
            self._index.mark_again(old)
            return
        if old is not None or self._parts.contradicts(part, done=stream.done):
            text = f"response line {part.line}: attempt {part.attempt} of request line {part.request} has another "
            self._note(Kind.CONFLICTING, part.line, f"{text}message {part.place}, or another last message")
            if self._parts.is_whole(part):
                return
            self._parts.begin_anew(part, done=stream.done)
        if (whole := self._parts.add(part, answer, done=stream.done)) is not None:
            self._settle(whole)

    def _settle(self, new: Answer) -> None:
        old = self._index.answer_to(new.request)
        if old is None:
            self._index.set_answer(new)
            self.answered += 1
            return
        same = _same(self._pick(old), self._pick(new))
        kind, is_what = (Kind.DUPLICATE, "the same answer as") if same else (Kind.CONFLICTING, "another answer than")
        text = f"response line {new.line}: {is_what} line {old.line}, to request line {new.request}"
        self._note(kind, new.line, text)
        if old.status >= 400 > new.status:
            self._index.set_answer(new)

    def _note(self, kind: Kind, line: int, text: str, *, not_joined: bool = False) -> None:
        self.counts[kind] += 1
        self._index.add_problem(kind, Problem(line, text), request_not_joined=not_joined)

    def _pick(self, answer: Answer) -> bytes:
        """The text of a response; of a stream, of all its messages together."""
        if answer.attempt is None:
            return _line_at(self._picked, answer)
        if answer.status >= 400:
            return whole_response([_line_at(self._picked, answer)])
        parts = self._index.parts(answer.request, answer.attempt)
        return whole_response(_line_at(self._picked, part) for part in parts)

    def _failure(self, answer: Answer) -> Problem:
        body = read_json(self._pick(answer)).get("body")
        error = body.get("error") if isinstance(body, dict) else None
        message = error.get("message") if isinstance(error, dict) else None
        where = f"request line {answer.request}: status {answer.status} (response line {answer.line})"
        return Problem(answer.request, where if message is None else f"{where}: {message}")


def _line_at(file: BinaryIO, at: Answer | Part) -> bytes:
    file.seek(at.offset)
    return strip(at.line, file.readline())


def _metadata(line: Line) -> Any:
    request = read_json(line.data)
    if not isinstance(request, dict):
        raise Malformed("it is not a JSON object")
    if not isinstance(request.get("metadata"), dict):
        raise Malformed("metadata is missing or not a JSON object")
    return request["metadata"]


def _response(line: Line) -> dict[str, Any]:
    response = read_json(line.data)
    if not isinstance(response, dict):
        raise Malformed("it is not a JSON object")
    status = response.get("status_code")
    if not isinstance(status, int) or isinstance(status, bool) or not 100 <= status <= 599:
        raise Malformed("status_code is missing or not an integer from 100 to 599")
    if "metadata" not in response:
        raise Malformed("metadata is missing")
    return response


def _same(one: bytes, other: bytes) -> bool:
    """Whether two responses to one request say the same."""
    if one == other:
        return True
    first, second = read_json(one), read_json(other)
    first["metadata"] = second["metadata"] = None  # they were matched; by some of its keys, perhaps
    return canonical(first) == canonical(second)
