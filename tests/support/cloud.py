"""The local cloud for tests: the same code as `localstack/up`, on free ports, for the length of a test session."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import children
import pytest
from local_cloud.errors import CloudError
from local_cloud.resources import aws_environment, pubsub_environment
from local_cloud.services import HOST, Running, Service, free_port, localstack, pubsub, start, taken

PORT_ATTEMPTS = 3


@pytest.fixture(scope="session")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """LocalStack is up, and the environment names it; gives its endpoint URL.

    `REJOINDER_TEST_AWS=http://host:port` gives one that runs already.
    """
    with (
        running(
            os.environ.get("REJOINDER_TEST_AWS"), tmp_path_factory.mktemp("localstack"), localstack, "http://"
        ) as endpoint,
        environment(aws_environment(endpoint)),
    ):
        yield endpoint


@pytest.fixture(scope="session")
def gcp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The Pub/Sub emulator is up, and the environment names it; gives its host:port.

    `REJOINDER_TEST_PUBSUB=host:port` gives one that runs already.
    """
    folder = tmp_path_factory.mktemp("pubsub")
    with (
        running(os.environ.get("REJOINDER_TEST_PUBSUB"), folder, lambda port, _: pubsub(port)) as address,
        environment(pubsub_environment(address)),
    ):
        yield address


@contextmanager
def running(
    given: str | None, folder: Path, service: Callable[[int, Path], Service], scheme: str = ""
) -> Iterator[str]:
    """The service on a free port, or the one that is `given`; stopped at the end unless given."""
    if given:
        yield given
        return
    started = on_a_free_port(folder, service)
    children.lasting.add(started.process.pid)
    try:
        yield f"{scheme}{HOST}:{started.service.port}"
    finally:
        started.stop()


def on_a_free_port(folder: Path, service: Callable[[int, Path], Service]) -> Running:
    """Start the service and wait for it. A port that is free now can be gone a moment later: then another is tried."""
    for attempt in range(PORT_ATTEMPTS):
        started = start(service(free_port(), folder), folder, tied=True)
        try:
            started.until_ready()
        except BaseException as exc:
            started.stop()
            lost_the_port = isinstance(exc, CloudError) and taken(started.service.port)
            if not lost_the_port or attempt == PORT_ATTEMPTS - 1:
                raise
        else:
            return started
    raise AssertionError


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, for child processes too, and restore what was there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
