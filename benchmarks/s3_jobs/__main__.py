"""Memory and speed of one job of JSON lines through a real worker, measured from outside its process.

    uv run python -m benchmarks.s3_jobs [--mib 1024] [--line-bytes 1024] [--store file|s3] [--tiny]

`rejoinder worker --engine echo` runs a job whose input has so many MiB and whose output has a little more: on `file`
in a directory, on `s3` in LocalStack, started for it unless REJOINDER_TEST_AWS names a running one. Memory is the
worker's resident set, all of it: its maximum (the kernel's own mark, VmHWM) beyond what it had when it was ready
and idle. More than 96 MiB beyond is a failure: exit code 1.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

from benchmarks.clouds import clouds
from rejoinder.adapters import Outgoing, open_blobs, open_subscription, open_topic

FLOOR = 96.0
MIB = 1 << 20
LIMIT = 3600.0


def memory(pid: int, name: str) -> float:
    """One of the kernel's figures of a process, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) / 1024


async def tiny(size: int, line_bytes: int) -> AsyncIterator[bytes]:
    """JSON lines of the values that take most memory for their text, of `size` bytes in all."""
    line = b"[" + b"{}," * max(0, (line_bytes - 5) // 3) + b"{}]\n"
    for _ in range(0, size, len(line)):
        yield line


async def lines(size: int, line_bytes: int) -> AsyncIterator[bytes]:
    """JSON lines as requests have them, of `size` bytes in all."""
    made = number = 0
    while made < size:
        piece = bytearray()
        while len(piece) < MIB and made + len(piece) < size:
            body = {"model": "m", "max_tokens": 16, "n": number, "prompt": ""}
            body["prompt"] = "some words " * (max(0, line_bytes - len(json.dumps(body))) // 11 + 1)
            text = json.dumps(body)[: line_bytes - 4]
            piece += (text if text.endswith("}") else text[:-2] + '"}').encode() + b"\n"
            number += 1
        made += len(piece)
        yield bytes(piece)


@contextlib.contextmanager
def worker(folder: str, store: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of `store`, ready and idle."""
    command = [sys.executable, "-m", "rejoinder.cli.main", "worker", "--engine", "echo", "--log-format", "json"]
    command += ["--requests", requests(folder), "--responses", responses(folder), "--blobs", store]
    log = Path(folder) / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr)
    try:
        deadline = time.monotonic() + 60
        while b"engine_ready" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(log.read_text())
            time.sleep(0.05)
        time.sleep(1)  # what it does once at its start is done
        yield process
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            raise SystemExit(log.read_text())
    finally:
        process.kill()
        process.wait()


def requests(folder: str) -> str:
    return f"sqlite:///{folder}/queues.db?queue=requests"


def responses(folder: str) -> str:
    return f"sqlite:///{folder}/queues.db?queue=responses"


async def run_job(folder: str, location: str) -> str:
    """Run one job; return where its output is."""
    async with open_topic(requests(folder)) as topic, open_subscription(responses(folder)) as subscription:
        envelope = {"path": "/echo", "metadata": {}, "input_location": location}
        await topic.publish([Outgoing(json.dumps(envelope).encode())])
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            for message in await subscription.receive(1, 5):
                response = json.loads(message.body)
                if response["status_code"] != 200:
                    raise SystemExit(f"the job failed: {response}")
                return str(response["output_location"])
        raise SystemExit(f"no response in {LIMIT:g} s")


async def counted(store: str, location: str) -> tuple[int, int]:
    """The bytes and lines of an object."""
    size = count = 0
    async with open_blobs(store) as blobs, blobs.read(location.removeprefix(f"{blobs.url}/")) as blob:
        async for chunk in blob.chunks:
            size += len(chunk)
            count += chunk.count(b"\n")
    return size, count


async def measure(folder: str, store: str, made: AsyncIterator[bytes], line_bytes: int) -> float:
    """Print what one job took; return its memory over idle, in MiB."""
    async with open_blobs(store) as blobs:
        key = f"inputs/{uuid4().hex}.jsonl"
        await blobs.put(key, made, "application/jsonl")
        location = blobs.location(key)
    size_in, lines_in = await counted(store, location)
    with worker(folder, store) as process:
        idle = memory(process.pid, "VmRSS")
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the mark begins anew
        began = time.monotonic()
        output = await run_job(folder, location)
        seconds = time.monotonic() - began
        peak = memory(process.pid, "VmHWM")
    size_out, lines_out = await counted(store, output)
    if lines_in != lines_out:
        raise SystemExit(f"{lines_in} lines went in, {lines_out} came out")
    print(
        f"{store.partition(':')[0]}, lines of {line_bytes} bytes: {size_in / MIB:.0f} MiB in, {size_out / MIB:.0f} MiB"
        f" out, {lines_in} lines in {seconds:.1f} s: {size_in / MIB / seconds:.1f} MiB/s in, {lines_in / seconds:.0f}"
        f" lines/s; {peak - idle:.1f} MiB over idle ({idle:.1f} MiB)"
    )
    return peak - idle


async def bucket() -> str:
    """The URL of a new bucket in LocalStack."""
    import aiobotocore.session

    name = f"jobs-{uuid4().hex}"
    async with aiobotocore.session.get_session().create_client("s3") as client:
        await client.create_bucket(Bucket=name)
    return f"s3://{name}/bench?region={os.environ['AWS_DEFAULT_REGION']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=1024, help="of input (default: 1024)")
    parser.add_argument("--line-bytes", type=int, default=1024, help="of each line (default: 1024)")
    parser.add_argument("--store", choices=["file", "s3"], default="file")
    parser.add_argument("--tiny", action="store_true", help="lines of empty objects, which take 24 times their text")
    parser.add_argument("--dir", help="where the files are (default: a temporary directory)")
    arguments = parser.parse_args()
    cloud = arguments.store == "s3"
    with clouds(aws=cloud, gcp=False), tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        store = asyncio.run(bucket()) if cloud else f"file://{folder}/blobs"
        made = (tiny if arguments.tiny else lines)(int(arguments.mib * MIB), arguments.line_bytes)
        over = asyncio.run(measure(folder, store, made, arguments.line_bytes))
    sys.exit(1 if over > FLOOR else 0)


if __name__ == "__main__":
    main()
