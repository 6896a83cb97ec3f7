"""The local cloud in containers: docker compose with `localstack/compose.yaml`."""

import os
import shutil
import subprocess
from pathlib import Path

from local_cloud.errors import CloudError

FILE = Path(__file__).parents[1] / "compose.yaml"
PORT_VARIABLES = ("REJOINDER_AWS_PORT", "REJOINDER_PUBSUB_PORT")
ASK_SECONDS = 20
UP_SECONDS = 900
"""The images are about 2 GB; the first time they are pulled."""


def missing() -> str | None:
    """What is missing for containers, in words; None if nothing is."""
    if shutil.which("docker") is None:
        return "no docker on the PATH"
    for command, lacking in (
        (("docker", "version", "--format", "{{.Server.Version}}"), "no Docker engine answers"),
        (("docker", "compose", "version"), "docker has no compose plugin"),
    ):
        try:
            if subprocess.run(command, check=False, capture_output=True, timeout=ASK_SECONDS).returncode:  # noqa: S603
                return lacking
        except subprocess.TimeoutExpired:
            return lacking
    return None


def running() -> bool:
    """Whether a container of ours runs."""
    return bool(_compose("ps", "--status", "running", "-q", limit=ASK_SECONDS).strip())


def up(aws_port: int, pubsub_port: int) -> None:
    """Start both containers and wait until they are healthy."""
    ports: dict[str, str] = dict(zip(PORT_VARIABLES, map(str, (aws_port, pubsub_port)), strict=True))
    _compose("up", "--detach", "--wait", limit=UP_SECONDS, environment=ports)


def down() -> None:
    """Remove both containers and what they hold."""
    _compose("down", "--volumes", "--timeout", "10", limit=ASK_SECONDS * 3)


def _compose(*arguments: str, limit: float, environment: dict[str, str] | None = None) -> str:
    command = ("docker", "compose", "--file", str(FILE), *arguments)
    try:
        done = subprocess.run(  # noqa: S603
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=limit,
            env={**os.environ, **(environment or {})},
        )
    except (subprocess.TimeoutExpired, FileNotFoundError) as exc:
        raise CloudError(f"`docker compose {arguments[0]}` failed: {exc}") from exc
    if done.returncode:
        last = " ".join(done.stderr.split("\n")[-4:]).strip()
        raise CloudError(f"`docker compose {arguments[0]}` failed: {last}; `docker compose -f {FILE} logs` says more")
    return done.stdout
