"""Messages per second through one worker with the echo engine on SQS and Pub/Sub, over a bare loop and over others.

    uv run python -m benchmarks.brokers [sqs|pubsub|all] [--messages N] [--runs N] [--receivers N] [--only NAME ...]
        [--calls]

All sides work off backlogs of as many messages on the same emulator, each in fresh queues: LocalStack for SQS, the
official emulator for Pub/Sub, started for it unless REJOINDER_TEST_AWS and REJOINDER_TEST_PUBSUB name running ones.

- worker: `rejoinder worker --engine echo`, with its default settings.
- bare loop: receive, send the body as it is, delete, straight on the worker's SDK (aiobotocore; google.pubsub_v1), in
  batches as large as the worker's, and with the attributes that the contract has on every message, which the emulators
  take time for: it asks of the broker what the worker asks. No JSON, no leases. `--receivers` of these run at once, as
  many as the worker has receives in flight at most.
- bodies only: the same without attributes, which no worker of this contract can be.
- on SQS: taskiq-aio-sqs, Celery and dramatiq_sqs, each with a task that sends the body to the response queue as a
  message of its own kind, and each in an environment of its own (peers/*.txt), made by uv on first use. Their settings
  stand in the output and in sides.py: of those tried, the fastest.
- on Pub/Sub: the callback client, `SubscriberClient.subscribe`, which publishes and then acks.

Rates are the broker's: responses between the times at which it took the first and the last one, so that no side pays
for its start. Nothing else is asked of the broker meanwhile; responses are counted when the side has become quiet.
Sides take turns, so that a machine whose speed drifts drifts for all, and a ratio is the median of the runs' ratios.

An emulator on the same two cores takes most of them, so ratios say how many calls a side makes more than how fast it
is; `--calls` counts them, in one more run each. Exit code 1 if a ratio is below its floor: 0.8 of either loop, 1.5
times the fastest of the others.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.brokers.measure import rate
from benchmarks.brokers.sides import LOOP, RECEIVERS, WORKER, Broker, Side, sides
from benchmarks.clouds import clouds

MESSAGES = {"sqs": 3_000, "pubsub": 60_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("broker", nargs="?", choices=["sqs", "pubsub", "all"], default="all")
    parser.add_argument("--messages", type=int, help="in the backlog (default: 3,000 on SQS, 60,000 on Pub/Sub)")
    parser.add_argument("--runs", type=int, default=3, help="of each side (default: 3)")
    parser.add_argument("--receivers", type=int, default=RECEIVERS, help=f"of the bare loop (default: {RECEIVERS})")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these sides besides the worker")
    parser.add_argument("--calls", action="store_true", help="count the broker calls of the worker and the bare loop")
    arguments = parser.parse_args()
    brokers: list[Broker] = ["sqs", "pubsub"] if arguments.broker == "all" else [arguments.broker]
    missed = False
    for broker in brokers:
        with clouds(aws=broker == "sqs", gcp=broker == "pubsub"):
            chosen = [
                side
                for side in sides(broker, arguments.receivers)
                if arguments.only is None or side.name in (WORKER, *arguments.only)
            ]
            missed |= compare(broker, chosen, arguments)
    sys.exit(1 if missed else 0)


def compare(broker: Broker, chosen: list[Side], arguments: argparse.Namespace) -> bool:
    """Measure all sides and print what came of it. Whether a floor was missed."""
    messages = arguments.messages or MESSAGES[broker]
    print(f"{broker}, {messages:,} messages")
    for side in chosen:
        print(f"  {side.name}: {side.how}", flush=True)
    rates: dict[str, list[float]] = {side.name: [] for side in chosen}
    for number in range(1, arguments.runs + 1):
        for side in chosen:
            found, twice = asyncio.run(rate(side, broker, messages, arguments.receivers))
            rates[side.name].append(found)
            if twice:
                print(f"  {side.name} answered {twice} too many", flush=True)
        print(f"run {number}: " + ", ".join(f"{name} {found[-1]:,.0f}/s" for name, found in rates.items()), flush=True)
    if arguments.calls:
        count(broker, chosen, messages, arguments.receivers)
    print(f"median of {arguments.runs}: worker {statistics.median(rates[WORKER]):,.0f} messages/s")
    others = [side for side in chosen if side.name != WORKER]
    missed = False
    for side in others:
        ratio = statistics.median(w / o for w, o in zip(rates[WORKER], rates[side.name], strict=True))
        met = "met" if ratio >= side.floor else "MISSED"
        missed |= ratio < side.floor
        print(
            f"  {side.name}: {statistics.median(rates[side.name]):,.0f} messages/s, worker over it {ratio:.2f}"
            f" (floor {side.floor}: {met})",
            flush=True,
        )
    return missed


def count(broker: Broker, chosen: list[Side], messages: int, receivers: int) -> None:
    """One more run of the worker and the bare loop each, with their calls counted."""
    for side in chosen:
        if side.name not in {WORKER, LOOP}:
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "calls.json"
            asyncio.run(rate(side, broker, messages, receivers, file))
            calls = json.loads(file.read_text())
        each = ", ".join(f"{name} {number} ({messages / number:.1f} a call)" for name, number in calls.items())
        print(f"calls of {side.name}: {sum(calls.values()) / messages:.3f} a message: {each}", flush=True)


if __name__ == "__main__":
    main()
