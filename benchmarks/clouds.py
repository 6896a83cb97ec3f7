"""What benchmarks run against: the emulators of the tests, started the same way. And processes that end with them.

`REJOINDER_TEST_AWS=http://host:port` and `REJOINDER_TEST_PUBSUB=host:port` name ones that run already.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
for folder in ("tests/support", "localstack"):
    sys.path.insert(0, str(ROOT / folder))

from cloud import environment, running  # noqa: E402
from local_cloud.services import PROJECT, localstack, pubsub, tie  # noqa: E402

REGION = "us-east-1"
AWS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": REGION}


@contextmanager
def clouds(*, aws: bool, gcp: bool) -> Iterator[None]:
    """Have LocalStack (`aws`) and the Pub/Sub emulator (`gcp`) up, and named by the environment."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        if aws:
            given, home = os.environ.get("REJOINDER_TEST_AWS"), Path(folder) / "localstack"
            endpoint = stack.enter_context(running(given, home, localstack, "http://"))
            stack.enter_context(environment({"AWS_ENDPOINT_URL": endpoint, **AWS}))
        if gcp:
            given, home = os.environ.get("REJOINDER_TEST_PUBSUB"), Path(folder) / "pubsub"
            host = stack.enter_context(running(given, home, lambda port, _: pubsub(port)))
            stack.enter_context(environment({"PUBSUB_EMULATOR_HOST": host, "PUBSUB_PROJECT_ID": PROJECT}))
        yield


@contextmanager
def child(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in a group of its own, which ends with the context; or with this process, however that ends.

    Whoever works on would be in the figures of what is measured next. `options` are those of `Popen`.
    """
    process = subprocess.Popen(tie(command), stdin=subprocess.PIPE, start_new_session=True, **options)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin:
            process.stdin.close()
