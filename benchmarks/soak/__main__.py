"""A worker for long under long jobs and a short lease: nothing comes twice, nothing is lost, and nothing grows.

    uv run python -m benchmarks.soak [--broker sqs|pubsub|sqlite|all] [--minutes 10] [--jobs 5 90] [--capacity 64]

A real worker, but for an engine whose jobs take 5 to 90 s, uniformly, works under a lease of 10 s, with more requests
waiting than it can run, for as many minutes; then until all are answered. `all` brokers are soaked at once. LocalStack
and the Pub/Sub emulator are started for it, unless REJOINDER_TEST_AWS and REJOINDER_TEST_PUBSUB name running ones.

What must hold, or the exit code is 1 and a line says what did not:

- no premature redelivery: no request is started twice, and no lease is lost;
- each request is answered once, with status 200;
- after the first quarter of the time, memory (RSS), asyncio tasks, threads and file descriptors do not grow: the median
  of the last third is at most that of the first third and 5 % and 8 MiB (memory), a tenth and 16 (tasks), 2 (threads),
  4 (file descriptors) more;
- the worker ends with exit code 0 on SIGTERM.
"""

import argparse
import asyncio
import sys
from statistics import median

from benchmarks.clouds import clouds
from benchmarks.soak.brokers import BROKERS
from benchmarks.soak.judge import TOLERANCES, Record, breaches, figure
from benchmarks.soak.run import Plan, soak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", choices=[*BROKERS, "all"], default="all")
    parser.add_argument("--minutes", type=float, default=10.0, help="of load, before the last jobs (default: 10)")
    parser.add_argument("--jobs", type=float, nargs=2, default=(5.0, 90.0), metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--capacity", type=int, default=64, help="jobs at once (default: 64)")
    arguments = parser.parse_args()
    names = list(BROKERS) if arguments.broker == "all" else [arguments.broker]
    plan = Plan(60 * arguments.minutes, *arguments.jobs, arguments.capacity)
    with clouds(aws="sqs" in names, gcp="pubsub" in names):
        records = asyncio.run(_all(names, plan))
    failed = [_tell(name, record) for name, record in zip(names, records, strict=True)]
    sys.exit(1 if any(failed) else 0)


async def _all(names: list[str], plan: Plan) -> list[Record]:
    return await asyncio.gather(*(soak(name, plan) for name in names))


def _tell(name: str, record: Record) -> bool:
    """Print what came of one soak. Whether something did not hold."""
    seconds = record.load[1] - record.load[0]
    print(
        f"{name}: {seconds:.0f} s, {len(record.sent)} requests, {len(record.starts)} starts,"
        f" {len(record.answers)} answers, longest job {record.longest_job:.1f} s"
    )
    for kind in TOLERANCES:
        values = [value for at, value in record.series[kind] if record.load[0] <= at <= record.load[1]]
        if values:
            low, middle, high = (figure(kind, value) for value in (min(values), median(values), max(values)))
            print(f"  {kind}: {low} to {high}, median {middle}")
    found = breaches(record)
    for line in found:
        print(f"  BREACH: {line}")
    if not found:
        print("  all held")
    return bool(found)


if __name__ == "__main__":
    main()
