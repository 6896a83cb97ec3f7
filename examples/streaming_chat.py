r"""A chat whose answer is printed as it comes: a small client of a worker with rejoinder's own engine.

    rejoinder worker --model smollm2 \
        --requests 'sqlite:///work.db?queue=requests' --responses 'sqlite:///work.db?queue=responses' &
    python examples/streaming_chat.py --requests 'sqlite:///work.db?queue=requests' \
        --responses 'sqlite:///work.db?queue=responses' 'What is the capital of France?'

Give it a queue of responses that nobody else reads: what is not of this chat is dropped. A worker that dies in the
middle is no end: another attempt begins anew, and the client says so. Ctrl-C cancels the request at the worker, and
waits for its last word.
"""

import argparse
import asyncio
import sys
import uuid
from contextlib import aclosing
from typing import Any

from rejoinder.client.cancel import cancel
from rejoinder.client.consume import responses
from rejoinder.client.publish import Publisher
from rejoinder.schemas.envelope import Response


class Transcript:
    """The text of one stream in its order, whatever the order and the number of times that its messages come."""

    def __init__(self) -> None:
        self._attempt = self._next = 0
        self._early: dict[int, Response] = {}

    def take(self, response: Response) -> Response | None:
        """Print what can be printed now; give the last message, when all before it are printed."""
        if response.stream is None:
            return response  # it was refused before it was run
        if response.stream.attempt > self._attempt:
            if self._next:
                print("\n[another attempt, from the beginning]")
            self._attempt, self._next, self._early = response.stream.attempt, 0, {}
        if response.stream.attempt == self._attempt:
            self._early[response.stream.index] = response
        while message := self._early.pop(self._next, None):
            self._next += 1
            print(text_of(message), end="", flush=True)
            if message.stream and message.stream.done:
                return message
        return None


def text_of(message: Response) -> str:
    """What its chunks, in OpenAI's shape, add to the text of the first choice."""
    if message.stream is None or message.status_code >= 400:
        return ""
    chunks: Any = [message.body] if message.stream.chunks == 1 else message.body or []
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


async def read(url: str, name: str) -> Response:
    """Print the stream as it comes, and give its last message."""
    transcript = Transcript()
    async with aclosing(responses(url)) as incoming:
        async for received in incoming:
            if received.attributes.get("response_id") == name and (last := transcript.take(received.read())):
                return last
    raise AssertionError("responses end only where a count or an idle time is given")


async def chat(arguments: argparse.Namespace) -> int:
    """Ask, print, and give the exit code."""
    name = uuid.uuid4().hex
    messages = [{"role": "user", "content": arguments.prompt}]
    body = {"messages": messages, "max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
    options = {"stream": True, "inference_id": name}
    async with Publisher(arguments.requests) as publisher:
        await publisher.publish({"path": "/v1/chat/completions", "metadata": {}, "body": body, "options": options})
    reading = asyncio.create_task(read(arguments.responses, name))
    try:
        last = await asyncio.shield(reading)
    except asyncio.CancelledError:  # Ctrl-C
        await cancel(arguments.requests, [name])
        last = await reading
    print()
    if last.status_code >= 400:
        print(f"{last.status_code}: {last.body['error']['message']}", file=sys.stderr)
        return 1
    print(f"{last.body['usage']['completion_tokens']} tokens", file=sys.stderr)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", required=True, metavar="URL")
    parser.add_argument("--responses", required=True, metavar="URL")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("prompt")
    sys.exit(asyncio.run(chat(parser.parse_args())))
