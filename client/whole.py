"""The messages of a whole stream as the text of one response, as a request without a stream would have got it."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import ValidationError

from rejoinder.client.keys import Malformed, read_json
from rejoinder.schemas.assembly import assemble, chunks_of
from rejoinder.schemas.envelope import Stream
from rejoinder.schemas.problems import first_problem
from rejoinder.schemas.reading import MAX_NESTING, too_deep
from rejoinder.schemas.wire import write_json

MOST = (1 << 63) - 1
"""The largest integer that the index carries."""

_KEY = re.compile(r'[ \t\n\r{,]*("[^"\\]*(?:\\.[^"\\]*)*")[ \t\n\r]*:[ \t\n\r]*')
# Where a value ends is all that is asked: a number stays text, of however many digits.
_SCAN = json.JSONDecoder(parse_int=str, parse_float=str).scan_once  # type: ignore[attr-defined]


def stream_of(response: dict[str, Any], data: bytes) -> Stream | None:
    """Where a response stands in its stream; None where it is a whole answer.

    Args:
        response: What `data` is.
        data: Its JSON.

    Raises:
        ValueError: it has a `stream` that is none, or a body that is not what it says.
    """
    values = response.get("stream")
    if values is None:
        return None
    if not isinstance(values, dict):
        raise Malformed("stream is not a JSON object")
    try:
        stream = Stream.model_validate(values)
    except ValidationError as exc:
        raise Malformed(first_problem(exc, Stream, values, "stream")[0]) from exc
    if stream.index > MOST or stream.attempt > MOST:
        raise Malformed("stream.index or stream.attempt is past all bounds")
    if data.count(b"[") + data.count(b"{") > MAX_NESTING and too_deep(_body_of(dict(_members(data.decode())))):
        # It was read, but inside the body of the whole response it might be one level too much.
        raise Malformed(f"a chunk nests deeper than {MAX_NESTING} levels")
    if response["status_code"] < 400 or not stream.done:  # an error is no chunk
        chunks_of(stream, response.get("body"))
    return stream


def whole_response(messages: Iterable[bytes]) -> bytes:
    """All messages of one attempt, in order, as one response.

    It is the last message without its `stream`. A failure has its own body; else the body is the completion that the
    chunks are together, or the list of them, each with the text that it had.

    Args:
        messages: Their JSON, each of which `stream_of` has taken. Of a failure the last alone will do.
    """
    texts: list[str] = []
    last: dict[str, str] = {}
    for message in messages:
        last = dict(_members(message.decode()))
        texts += _chunks(last)
    if int(last["status_code"]) < 400:
        last["body"] = _body(f"[{','.join(texts)}]")
    return ("{" + ",".join(f"{json.dumps(key)}:{text}" for key, text in last.items() if key != "stream") + "}").encode()


def _chunks(message: dict[str, str]) -> list[str]:
    """The text of a message's chunks: of one, or of several with commas between."""
    chunks = read_json(message["stream"].encode()).get("chunks", 1)
    body = _body_of(message)
    return ([body] if chunks == 1 else [body[1:-1]]) if chunks else []


def _body_of(message: dict[str, str]) -> str:
    return message.get("body", "null")


def _body(listed: str) -> str:
    try:
        chunks = json.loads(listed)
        whole = assemble(chunks)
        return listed if whole is chunks else write_json(whole)
    except ValueError:
        return listed  # it has a number that only text carries, past 4300 digits or what a double holds


def _members(text: str) -> Iterator[tuple[str, str]]:
    """The keys of a JSON object, which `text` is known to be, each with the text of its value."""
    at = 0
    while (key := _KEY.match(text, at)) is not None:
        _, at = _SCAN(text, key.end())
        yield json.loads(key[1]), text[key.end() : at]
