"""The worker's side: `rejoinder worker` on a backlog in a queue of the embedded broker."""

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engine.loads import Prompt
from rejoinder.adapters import Outgoing, open_subscription, open_topic

LIMIT = 1800.0


async def run(model: str, requests: list[Prompt], flags: list[str]) -> dict[str, Any]:
    """Seconds, by the clock and of the processor, from the engine's readiness to the last response, and tokens."""
    with tempfile.TemporaryDirectory() as folder:
        base = f"sqlite:///{Path(folder) / 'bench.db'}"
        queues = {"requests": f"{base}?queue=requests", "responses": f"{base}?queue=responses"}
        async with open_topic(queues["requests"]) as topic:
            bodies = [{"prompt": r.text, "max_tokens": r.max_tokens, "temperature": 0} for r in requests]
            await topic.publish(
                [Outgoing(json.dumps({"metadata": {"n": n}, "body": body}).encode()) for n, body in enumerate(bodies)]
            )
        log = Path(folder) / "worker.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "rejoinder.cli.main", "worker", "--model", model, "--log-format", "json", *flags]
                + [f"--{name}={url}" for name, url in queues.items()],
                stderr=stderr,
            )
        try:
            return await _measured(queues["responses"], len(requests), log, process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


async def _measured(url: str, count: int, log: Path, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    tokens = got = 0
    last = 0.0
    deadline = time.monotonic() + LIMIT
    while (ready := _ready(log)) is None:
        if time.monotonic() > deadline or process.poll() is not None:
            raise SystemExit(f"the engine did not become ready: {log.read_text()}")
        await asyncio.sleep(0.02)
    before = _processor_seconds(process.pid)
    async with open_subscription(url) as subscription:
        while got < count:
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit(f"{got} of {count} responses came: {log.read_text()}")
            for message in (batch := await subscription.receive(100, 5)):
                body = json.loads(message.body)["body"]
                if "usage" not in body:
                    raise SystemExit(f"a request failed: {body}")
                tokens += body["usage"]["completion_tokens"]
                last = max(last, message.sent_at or 0.0)
            await subscription.ack(batch)
            got += len(batch)
    return {"seconds": last - ready, "processor": _processor_seconds(process.pid) - before, "tokens": tokens}


def _ready(log: Path) -> float | None:
    """When the engine became ready, in epoch seconds; None until it is."""
    for line in log.read_text().splitlines():
        if '"engine_ready"' in line:
            return datetime.fromisoformat(json.loads(line)["timestamp"]).timestamp()
    return None


def _processor_seconds(pid: int) -> float:
    """Of a process and all below it, so far."""
    worker = psutil.Process(pid)
    return sum(sum(one.cpu_times()[:2]) for one in [worker, *worker.children(recursive=True)])
