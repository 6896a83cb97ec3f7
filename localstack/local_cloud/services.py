"""The two emulators as processes: how each is started, when it is ready, how it is stopped."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from google.api_core.exceptions import GoogleAPICallError
from google.pubsub_v1 import PublisherClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport

from local_cloud.errors import CloudError
from local_cloud.install import localstack_python, pubsub_emulator
from local_cloud.resources import PROJECT

HOST = "127.0.0.1"
AWS_SERVICES = ("s3", "sqs", "sns")
READY_SECONDS = 240.0
"""LocalStack takes 10 to 25 s on an idle machine."""
STOP_SECONDS = 10.0
# Ends the process group when whoever started it is gone, killed included: the pipe on stdin closes then.
_TIED = 'exec 3<&0 </dev/null; { cat <&3 >/dev/null; kill -KILL 0; } & exec 3<&- "$@"'


def tie(command: Sequence[str]) -> list[str]:
    """Return what runs `command` for as long as this process lives.

    To be started in a session of its own, with a pipe on stdin that nobody else holds; `command` sees an empty stdin.
    """
    return ["sh", "-c", _TIED, "sh", *command]


@dataclass(frozen=True)
class Service:
    """One emulator: what starts it, and what tells that it is ready."""

    name: str
    option: str
    """The option that sets its port."""
    port: int
    command: Sequence[str]
    ready: Callable[[int], bool]
    """Whether it answers on this port."""
    marker: str
    """What its command line has and no other process's."""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def log_name(self) -> str:
        """The file that it logs to, in the folder where it is started."""
        return f"{self.name.replace('/', '').replace(' ', '-').lower()}.log"


def localstack(port: int, folder: Path) -> Service:
    """LocalStack on `port`, its files in `folder`; installed first if need be."""
    return Service(
        name="LocalStack",
        option="--aws-port",
        port=port,
        command=[str(localstack_python()), "-m", "localstack.runtime.main"],
        ready=localstack_ready,
        marker="localstack.runtime.main",
        environment={
            "GATEWAY_LISTEN": f"{HOST}:{port}",
            "SERVICES": ",".join(AWS_SERVICES),
            "EAGER_SERVICE_LOADING": "1",  # what cannot be loaded is known before the first request
            "SKIP_SSL_CERT_DOWNLOAD": "1",
            "DISABLE_EVENTS": "1",
            "DNS_ADDRESS": "0",
            "FILESYSTEM_ROOT": str(folder / "files"),
            "TMPDIR": str(folder / "tmp"),
        },
    )


def pubsub(port: int) -> Service:
    """The Pub/Sub emulator on `port`; it keeps everything in memory."""
    return Service(
        name="Pub/Sub emulator",
        option="--pubsub-port",
        port=port,
        command=[*pubsub_emulator(), f"--host={HOST}", f"--port={port}"],
        ready=pubsub_ready,
        marker=f"--port={port}",
    )


def localstack_ready(port: int) -> bool:
    """Whether LocalStack on `port` serves what we need.

    Raises:
        CloudError: it says that one of its services cannot be loaded.
    """
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/_localstack/health", timeout=5) as answer:
            states = json.load(answer)["services"]
    except (OSError, ValueError, KeyError):
        return False
    if failed := [name for name in AWS_SERVICES if states.get(name) == "error"]:
        raise CloudError(f"LocalStack cannot load {', '.join(failed)}")
    return all(states.get(name) in {"running", "available"} for name in AWS_SERVICES)


def pubsub_ready(port: int) -> bool:
    """Whether the emulator on `port` answers a call."""
    with grpc.insecure_channel(f"{HOST}:{port}") as channel:
        client = PublisherClient(transport=PublisherGrpcTransport(channel=channel))
        try:
            list(client.list_topics(project=f"projects/{PROJECT}", timeout=2, retry=None))
        except GoogleAPICallError:
            return False
    return True


@dataclass
class Running:
    """A service that was started by this process."""

    service: Service
    process: subprocess.Popen[bytes]
    log: Path

    def until_ready(self) -> None:
        """Wait until the service answers. Raises `CloudError`, with the end of its log, if it does not."""
        until_ready(self.service.name, self.service.ready, self.service.port, self.log, self.process.poll)

    def stop(self) -> None:
        """Stop the service with all that it started. A second call does nothing."""
        stop_group(self.process.pid)
        self.process.wait(STOP_SECONDS)
        if self.process.stdin:
            self.process.stdin.close()


def until_ready(
    name: str, ready: Callable[[int], bool], port: int, log: Path | None, ended: Callable[[], int | None]
) -> None:
    """Wait until the service `name` is `ready` on `port`.

    Raises:
        CloudError: it ended (`ended` gives its exit code then), or is not ready in time; has the end of its `log`.
    """
    deadline = time.monotonic() + READY_SECONDS
    while not ready(port):
        if (code := ended()) is not None:
            raise CloudError(f"{name} ended with exit code {code}{tail(log)}")
        if time.monotonic() > deadline:
            raise CloudError(f"{name} is not ready after {READY_SECONDS:g} s{tail(log)}")
        time.sleep(0.1)


def start(service: Service, folder: Path, *, tied: bool) -> Running:
    """Start `service` in a process group of its own, its log in `folder`.

    Args:
        service: What to start.
        folder: Where its log and its files go; made if it is missing.
        tied: Whether the service is to end with this process, whatever ends this process.

    Raises:
        CloudError: the port is taken.
    """
    refuse_taken(service.port, service.name, service.option)
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    log = folder / service.log_name
    command = tie(service.command) if tied else service.command
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603
            command,
            cwd=folder,
            env={**os.environ, **service.environment},
            stdin=subprocess.PIPE if tied else subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Running(service, process, log)


def stop_group(group: int) -> None:
    """End the process group: politely, and after `STOP_SECONDS` not. A group that has ended already is fine.

    Raises:
        CloudError: it does not end even so.
    """
    for sign, limit in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, sign)
        deadline = time.monotonic() + limit
        while alive(group) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not alive(group):
            return
    raise CloudError(f"process group {group} does not end; see `ps -A -o pid,pgid,stat,args`")


def alive(group: int, marker: str = "") -> bool:
    """Whether a process of the group, with `marker` in its command line, runs.

    Dead ones whose parent does not collect them do not count, but for one that still has threads (`Zl`): its sockets
    close with its last thread.
    """
    command = ["ps", "-A", "-ww", "-o", "pgid=,stat=,args="]
    try:
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
    except FileNotFoundError as exc:
        raise CloudError("the processes cannot be listed: install ps (package procps)") from exc
    for line in listing.splitlines():
        found, status, arguments = [*line.split(maxsplit=2), ""][:3]
        if found == str(group) and ("l" in status or not status.startswith("Z")) and marker in arguments:
            return True
    return False


def refuse_taken(port: int, name: str, option: str) -> None:
    """Raise `CloudError` if something listens on the port that the service `name` is to have."""
    if taken(port):
        raise CloudError(
            f"port {port} of {HOST} is taken by something else: stop that, or give {name} another ({option})"
        )


_EPHEMERAL = 32_768
"""Where the ports begin that Linux gives out by itself."""


def taken(port: int) -> bool:
    """Whether something listens on `port` of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def free_port() -> int:
    """Give a port that nobody listens on at this moment, and that the system gives to nobody who asks for any.

    One of those could be gone before it is listened on: every connection that is made meanwhile takes one.
    """
    low = 20_000
    while taken(port := low + secrets.randbelow(_EPHEMERAL - low)):
        pass
    return port


def tail(log: Path | None, lines: int = 15) -> str:
    """Give the end of `log`, to stand after what went wrong; nothing without one."""
    if log is None:
        return ""
    return "\n".join([f"; the end of {log}:", *log.read_text(errors="replace").splitlines()[-lines:]])
