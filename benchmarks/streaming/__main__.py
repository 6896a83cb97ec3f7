"""What a stream costs: the time to its first chunk through a worker, and the speed of a batch; and many at once.

    uv run python -m benchmarks.streaming [--runs 20] [--model smollm2] [--batch 32] [--batch-runs 5]
    uv run python -m benchmarks.streaming --many [sqlite pubsub pubsub-far fifo sqs] [--streams 50 200 400]

First chunk: one chat at a time through a worker in this process, its engine in another, and queues of the embedded
broker (SQLite). Of each request two times are taken: in the engine process from `generate` to the first chunk, and from
the publish of the request to the receipt of the stream's first message. Each has a prompt of its own, which is in no
cache.

Speed: `--batch` chats at once, streamed and not, in turn, in an engine process alone, by the clock and by the processor
time of both processes.

Each token: the processor time of this side of a stream, which decodes it, makes its chunk and the message between
processes, with a chunk for each token and with one for eight.

Many at once, instead of these: see many.py.
"""

import argparse
import asyncio

from benchmarks.engine import models
from benchmarks.streaming import chat, many


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batch-runs", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--many", nargs="*", choices=many.BROKERS, metavar="BROKER", help=", ".join(many.BROKERS))
    parser.add_argument("--streams", nargs="+", type=int, default=[50, 200, 400], help="at once, with --many")
    parser.add_argument("--seconds", type=float, default=5.0, help="each of them lasts, with --many")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="the worker's settings, with --many")
    arguments = parser.parse_args()
    if arguments.many is not None:
        settings = dict(one.split("=") for one in arguments.set)
        many.compare(arguments.many or list(many.BROKERS), arguments.streams, arguments.seconds, settings)
        return
    arguments.model = models.directory(arguments.model)
    asyncio.run(chat.each_token(arguments.model))
    if arguments.runs:
        asyncio.run(chat.first_chunks(arguments))
    if arguments.batch_runs:
        asyncio.run(chat.speed(arguments))


if __name__ == "__main__":
    main()
