"""Messages per second through one worker with the echo engine, against a bare loop on the same embedded broker.

    uv run python -m benchmarks.echo [--messages 20000] [--runs 5]

All sides work off the same backlog in a process of their own: `rejoinder worker --engine echo`, and two loops that only
receive, publish the body as it is and ack. One does so message by message, as a simple consumer is written; the other
by 512, which is what the broker can do at most: no JSON, no leases, no retries, one commit for hundreds. Rates come
from the times at which the broker took the responses, so that no side pays for its start. Runs alternate, so that a
machine whose speed drifts drifts for all.
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

LOOPS = {"one by one": 1, "by 512": 512}
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


async def bare_loop(requests: str, responses: str, messages: int, size: int) -> None:
    async with open_subscription(requests) as subscription, open_topic(responses) as topic:
        done = 0
        while done < messages:
            batch = await subscription.receive(size, 5)
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
            [sys.executable, "-m", "benchmarks.echo", requests, responses]
            + ["--messages", str(messages), "--size", str(LOOPS[kind])]
            if kind in LOOPS
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
    parser.add_argument("loop", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=512, help=argparse.SUPPRESS)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.loop:
        asyncio.run(bare_loop(arguments.loop[0], arguments.loop[1], arguments.messages, arguments.size))
        return
    rates: dict[str, list[float]] = {"worker": [], **{loop: [] for loop in LOOPS}}
    for number in range(1, arguments.runs + 1):
        for kind, found in rates.items():
            found.append(asyncio.run(run(kind, arguments.messages)))
        print(f"run {number}: " + ", ".join(f"{kind} {found[-1]:,.0f}/s" for kind, found in rates.items()), flush=True)
    print(f"median of {arguments.runs}: worker {statistics.median(rates['worker']):,.0f} messages/s")
    for loop in LOOPS:
        ratio = statistics.median(w / b for w, b in zip(rates["worker"], rates[loop], strict=True))
        print(f"  bare loop {loop}: {statistics.median(rates[loop]):,.0f} messages/s, worker over loop {ratio:.2f}")


if __name__ == "__main__":
    main()
