"""What the user's own functions cost through rejoinder, and what batches bring them.

    uv run python -m benchmarks.functions [--requests 20000] [--texts 256] [--runs 3]

First a `generate_batch` that does nothing: microseconds per request where a loop calls it, with the engine in this
process (threads, batches, checks), with the engine in a process of its own, as a worker has it (frames over a socket
pair), and through whole workers on queues in memory (JSON, leases, acks). Ways take turns within each run. Then
examples/embedding_job.py with all-MiniLM-L6-v2, in a process of its own: texts per second of batches as they come by
default, over those of one text in each call.
"""

import argparse
import asyncio
import statistics

from benchmarks.functions import batching, overhead
from rejoinder.worker.logs import configure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    configure("console", "warning")
    took: dict[str, list[float]] = {}
    for _ in range(arguments.runs):
        for name, way in overhead.WAYS.items():
            took.setdefault(name, []).append(1e6 * asyncio.run(way(arguments.requests)) / arguments.requests)
    print(f"{arguments.requests} requests, median of {arguments.runs}; microseconds of each:")
    for name, times in took.items():
        print(f"  {name:42} {statistics.median(times):8.2f}   ({min(times):.2f} to {max(times):.2f})")
    found = asyncio.run(batching.rates(arguments.texts, arguments.runs))
    print(f"{arguments.texts} texts, median of {arguments.runs}; texts per second of each:")
    for size in found[0]:
        print(f"  max_batch_size {size:<4} {statistics.median(run[size] for run in found):8.1f}")
    ratio = statistics.median(run[overhead.BATCH] / run[1] for run in found)
    print(f"batches of up to {overhead.BATCH} over single texts: {ratio:.2f}")


if __name__ == "__main__":
    main()
