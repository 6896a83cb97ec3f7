"""Messages per second through one worker with the echo engine, against a bare loop on the same embedded broker.

    uv run python -m benchmarks.echo [--messages 20000] [--runs 5]

Both sides work off the same backlog in a process of their own: `rejoinder worker --engine echo`, and a loop that only
receives, publishes the body as it is and acks. Rates are taken from the times at which the broker took the responses,
so that neither side pays for its start. Runs alternate, so that a machine whose speed drifts drifts for both.
"""

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rejoinder.adapters import Outgoing, open_subscription, open_topic

BARE = "bare"
LIMIT = 120.0


async def fill(url: str, messages: int) -> None:
    async with open_topic(url) as topic:
        for start in range(0, messages, 1000):
            batch = [
                Outgoing(
                    json.dumps({"path": "/echo", "metadata": {"id": n}, "body": {"prompt": f"hello {n}"}}).encode()
                )
                for n in range(start, min(start + 1000, messages))
            ]
            await topic.publish(batch)


async def bare_loop(requests: str, responses: str, messages: int) -> None:
    async with open_subscription(requests) as subscription, open_topic(responses) as topic:
        done = 0
        while done < messages:
            batch = await subscription.receive(512, 5)
            await topic.publish([Outgoing(message.body) for message in batch])
            await subscription.ack(batch)
            done += len(batch)


async def rate(responses: str, messages: int) -> float:
    """Wait for all responses and return how many per second the broker took between the first and the last."""
    async with open_subscription(responses) as subscription:
        deadline = time.monotonic() + LIMIT
        while (await subscription.backlog()).waiting < messages:
            if time.monotonic() > deadline:
                raise SystemExit(f"not all of {messages} messages came in {LIMIT:g} s")
            await asyncio.sleep(0.05)
        times: list[float] = []
        while len(times) < messages:
            batch = await subscription.receive(1000, 5)
            times += [message.sent_at or 0.0 for message in batch]
            await subscription.ack(batch)
    return (len(times) - 1) / (max(times) - min(times))


async def run(kind: str, messages: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        base = f"sqlite:///{Path(folder) / 'bench.db'}"
        requests, responses = f"{base}?queue=requests", f"{base}?queue=responses"
        await fill(requests, messages)
        command = (
            [sys.executable, "-m", "benchmarks.echo", BARE, requests, responses, "--messages", str(messages)]
            if kind == BARE
            else [sys.executable, "-m", "rejoinder.cli.main", "worker", "--engine", "echo"]
            + ["--requests", requests, "--responses", responses]
        )
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            return await rate(responses, messages)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bare", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.bare:
        asyncio.run(bare_loop(arguments.bare[1], arguments.bare[2], arguments.messages))
        return
    rates: dict[str, list[float]] = {"worker": [], BARE: []}
    for number in range(1, arguments.runs + 1):
        for kind, found in rates.items():
            found.append(asyncio.run(run(kind, arguments.messages)))
        print(f"run {number}: worker {rates['worker'][-1]:,.0f}/s, bare loop {rates[BARE][-1]:,.0f}/s", flush=True)
    worker, bare = (statistics.median(rates[kind]) for kind in ("worker", BARE))
    ratio = statistics.median(w / b for w, b in zip(rates["worker"], rates[BARE], strict=True))
    print(f"median of {arguments.runs}: worker {worker:,.0f} messages/s, bare loop {bare:,.0f}/s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
