"""The worker's side: `rejoinder worker` on a backlog in a queue of the embedded broker."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.engine.loads import Prompt
from rejoinder.adapters import Outgoing, open_subscription, open_topic

LIMIT = 1800.0


async def run(model: str, requests: list[Prompt], flags: list[str]) -> dict[str, Any]:
    """Seconds from the engine's readiness to the broker's taking the last response, and how many tokens came."""
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
    ready = next(
        datetime.fromisoformat(event["timestamp"]).timestamp()
        for event in map(json.loads, (line for line in log.read_text().splitlines() if line.startswith("{")))
        if event["event"] == "engine_ready"
    )
    return {"seconds": last - ready, "tokens": tokens}
