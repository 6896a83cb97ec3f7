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

from rejoinder.client.cancel import cancel, cancels_of
from rejoinder.client.publish import Publisher
from rejoinder.client.streams import Answered, Chunks, Restarted, streamed
from rejoinder.schemas.envelope import Response


async def read(url: str, name: str) -> Response:
    """Print the stream as it comes, and give the answer that it is together."""
    answers: list[Response] = []
    async with aclosing(streamed(url, until=lambda: bool(answers))) as events:
        async for event in events:
            if not isinstance(event, Chunks | Restarted | Answered) or event.name.response_id != name:
                continue  # of an earlier chat, say
            if isinstance(event, Chunks):
                print("".join(map(text_of, event.chunks)), end="", flush=True)
            elif isinstance(event, Restarted):
                print("\n[another attempt, from the beginning]")
            else:
                answers.append(event.response)
    return answers[0]


def text_of(chunk: Any) -> str:
    """What a chunk in OpenAI's shape adds to the answer."""
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


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
        await cancel(cancels_of(requests=arguments.requests), [name])
        last = await reading
    print()
    said: Any = last.body
    if last.status_code >= 400:
        print(f"{last.status_code}: {said['error']['message']}", file=sys.stderr)
        return 1
    print(f"{said['usage']['completion_tokens']} tokens", file=sys.stderr)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", required=True, metavar="URL")
    parser.add_argument("--responses", required=True, metavar="URL")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("prompt")
    sys.exit(asyncio.run(chat(parser.parse_args())))
