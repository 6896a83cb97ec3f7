"""The demo with the real model, its requests on one cloud and its responses on the other."""

import asyncio
import os
import sys
from pathlib import Path

import pytest
from broker_pairs import Pair, on


@pytest.mark.model
@on("sqs>pubsub", "pubsub>sqs")
async def test_the_demo_runs_on_both_clouds_mixed(pair: Pair, tmp_path: Path) -> None:
    queues = await pair.queues(lease=30)
    demo = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "rejoinder.cli.main", "demo", "--requests", queues.requests),
        *("--publish-to", queues.outbox, "--responses", queues.responses, "--consume-from", queues.inbox),
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "140"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(demo.communicate(), 280)
    assert demo.returncode == 0, err.decode()
    assert "13 requests, 12 ok, 1 refused (as intended)" in out.decode()
    assert "all joined: yes" in out.decode()
    assert "Paris" in out.decode()
