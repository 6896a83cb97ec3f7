"""What the user's own functions cost through rejoinder, and what batches bring them.

    uv run python -m benchmarks.functions [--requests 20000] [--texts 256] [--runs 3] [--threads 1]

First a `generate_batch` that does nothing: microseconds per request where a loop calls it, with the engine in this
process (threads, batches), with the engine in a process of its own, as a worker has it (frames over a socket pair), and
through whole workers with a backlog on queues in memory (JSON, leases, acks). Then examples/embedding_job.py with
all-MiniLM-L6-v2, in a process of its own: texts per second of batches as they come by default, over those of one text
in each call. Ways take turns within each run. Beside the clock stands processor time, of all processes together: it is
steadier where others use the machine.
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
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    configure("console", "warning")
    _overhead(arguments.requests, arguments.runs)
    _batching(arguments.texts, arguments.runs, arguments.threads)


def _overhead(requests: int, runs: int) -> None:
    found: dict[str, list[overhead.Cost]] = {}
    for _ in range(runs):
        for name, way in overhead.WAYS.items():
            found.setdefault(name, []).append(asyncio.run(way(requests)))
    print(f"{requests} requests, median of {runs}; microseconds of each by the clock, and of processor time:")
    for name, costs in found.items():
        clock, processor = (1e6 * statistics.median(values) for values in zip(*costs, strict=True))
        print(f"  {name:42} {clock:9.3f} {processor:9.3f}", flush=True)


def _batching(texts: int, runs: int, threads: int) -> None:
    for longest, found in asyncio.run(batching.costs(texts, runs, threads)).items():
        print(f"{texts} texts of 3 to {longest} words, median of {runs}, torch threads {threads}:")
        for size in found[0]:
            clock, processor = (
                1 / statistics.median(values) for values in zip(*[run[size] for run in found], strict=True)
            )
            print(f"  max_batch_size {size:<4} {clock:8.1f} texts per second, {processor:8.1f} of processor time")
        pairs = [(run[1], run[overhead.BATCH]) for run in found]
        clock = statistics.median(alone.clock / together.clock for alone, together in pairs)
        processor = statistics.median(alone.processor / together.processor for alone, together in pairs)
        print(f"  batches of up to {overhead.BATCH} over single texts: {clock:.2f}, {processor:.2f}", flush=True)


if __name__ == "__main__":
    main()
