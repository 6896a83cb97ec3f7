"""Streams as a user of the command line meets them: asked for, printed, joined."""

import json
import signal
from collections import defaultdict
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import Any

from command import rejoinder, start
from openai.types.chat import ChatCompletion
from pairs import sqlite
from queues import REQUESTS, RESPONSES, consume, counts, lines, publish
from worker_process import SlowWorker

from rejoinder.client.consume import responses
from rejoinder.client.lines import one_line
from rejoinder.client.streams import Answered, Chunks, Name, Restarted, Streams

CHAT = "/v1/chat/completions"


def asked(number: int, body: Any, path: str = "/echo") -> bytes:
    request = {"path": path, "metadata": {"n": number}, "body": body, "options": {"stream": True}}
    return json.dumps(request).encode()


def message(number: int, index: int, body: Any, *, done: bool = False, attempt: int = 1) -> bytes:
    stream = {"index": index, "done": done, "attempt": attempt}
    return json.dumps({"status_code": 200, "metadata": {"n": number}, "body": body, "stream": stream}).encode()


def chunk(content: str, finish: str | None = None) -> dict[str, Any]:
    delta = {"role": "assistant", "content": content}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


def test_streams_of_a_worker_are_joined_as_whole_answers(tmp_path) -> None:
    requests = [
        asked(0, ["Once", " upon", {"a": "time"}]),
        asked(1, [chunk("Once"), chunk(" upon"), chunk(" a time", "stop")], CHAT),
        asked(2, [], CHAT),
        asked(3, "refused", "/nowhere"),
    ]
    (tmp_path / "requests").write_bytes(lines(*requests))
    publish(tmp_path, REQUESTS, *requests)
    worker = ("worker", "--engine", "echo", "--default-path", CHAT, "--requests", REQUESTS, "--responses", RESPONSES)
    with start(*worker, cwd=tmp_path) as running:
        done = rejoinder("join", "requests", RESPONSES, "-o", "joined", "--timeout", "60", cwd=tmp_path)
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=60)
    assert done.returncode == 0, done.stderr
    assert counts(done.stderr) == dict.fromkeys(counts(done.stderr), 0) | {"requests": 4, "joined": 4, "failed": 1}
    joined = [json.loads(line) for line in (tmp_path / "joined").read_bytes().splitlines()]
    assert [json.dumps(line["request"]).encode() for line in joined] == requests
    responses = [line["response"] for line in joined]
    assert all("stream" not in response for response in responses)
    assert [response["status_code"] for response in responses] == [200, 200, 200, 404]
    assert responses[0]["body"] == ["Once", " upon", {"a": "time"}]
    completion = ChatCompletion.model_validate(responses[1]["body"], strict=True)
    assert completion.choices[0].message.content == "Once upon a time"
    assert completion.choices[0].finish_reason == "stop"
    assert responses[2]["body"] == []
    assert responses[3]["body"]["error"]["param"] == "path"
    assert not (tmp_path / "requests.responses").exists()


def test_a_join_from_a_url_waits_for_what_is_missing_of_a_stream(tmp_path) -> None:
    (tmp_path / "requests").write_bytes(lines(asked(0, "x"), asked(1, "x")))
    dead = [message(0, 0, "de"), message(0, 1, "ad"), message(1, 0, "a")]
    first, second, last = (message(0, index, letter, done=index == 2, attempt=2) for index, letter in enumerate("abc"))
    publish(tmp_path, RESPONSES, *dead, last, first)
    args = ("join", "requests", RESPONSES, "-o", "joined", "--timeout", "0.1", "--show", "missing")
    done = rejoinder(*args, cwd=tmp_path)
    assert done.returncode == 3
    assert counts(done.stderr)["missing"] == 2
    assert [line for line in done.stderr.decode().splitlines() if line.startswith("missing: ")] == [
        "missing: request line 1: 2 of 3 messages (attempt 2)",
        "missing: request line 2: no last message, 1 before it (attempt 1)",
    ]
    publish(tmp_path, RESPONSES, second, first, message(1, 1, "b", done=True))
    done = rejoinder(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert counts(done.stderr)["duplicate"] == 1
    joined = [json.loads(line)["response"]["body"] for line in (tmp_path / "joined").read_bytes().splitlines()]
    assert joined == [["a", "b", "c"], ["a", "b"]]


def test_consume_prints_messages_as_they_are(tmp_path) -> None:
    said = [message(0, 0, "a"), message(0, 0, "b", attempt=2), message(0, 1, "c", done=True, attempt=2)]
    publish(tmp_path, RESPONSES, *said)
    assert consume(tmp_path, RESPONSES, "--count", "3").stdout == lines(*said)


async def test_streams_of_a_killed_worker_are_read_and_joined_whole(tmp_path: Path) -> None:
    queues = sqlite(tmp_path, 5.0)
    requests = [asked(n, {"chunks": 30}) for n in range(4)]
    (tmp_path / "requests").write_bytes(lines(*requests))
    await queues.send(*requests)
    streams = Streams()
    came: list[bytes] = []
    shown: dict[Name, list[Any]] = defaultdict(list)
    answers: dict[Name, Any] = {}
    again = 0
    with ExitStack() as workers:
        first = workers.enter_context(SlowWorker(queues, tmp_path / "log", seconds=0.2, stream_interval_ms=10))
        source = responses(queues.inbox, until=lambda: len(answers) == len(requests))
        async with aclosing(source) as incoming:
            async for received in incoming:
                came.append(one_line(received.body))
                for event in streams.feed(received):
                    assert isinstance(event, Chunks | Restarted | Answered)
                    assert event.name not in answers
                    if isinstance(event, Chunks):
                        shown[event.name] += event.chunks
                    elif isinstance(event, Restarted):
                        shown[event.name] = []
                        again += 1
                    else:
                        answers[event.name] = event.response.body
                if first.process.poll() is None and len(shown) == len(requests):
                    first.kill()
                    workers.enter_context(SlowWorker(queues, tmp_path / "log", seconds=0.002, stream_interval_ms=10))
    assert again, "nothing was under way when the worker was killed"
    assert answers == shown
    assert streams.held == 0
    for body in answers.values():
        assert body[:-1] == [*range(30)]
    (tmp_path / "responses").write_bytes(lines(*came))
    done = rejoinder("join", "requests", "responses", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    joined = [json.loads(line)["response"]["body"] for line in done.stdout.splitlines()]
    assert sorted(map(json.dumps, joined)) == sorted(map(json.dumps, answers.values()))
    said = counts(done.stderr)
    assert said == dict.fromkeys(said, 0) | {"requests": 4, "joined": 4, "duplicate": said["duplicate"]}
