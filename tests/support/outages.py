"""A worker that reaches its broker through a proxy, and what can go wrong there."""

import contextlib
import os
from collections.abc import Callable, Iterator

from broker_pairs import Pair
from proxy import Proxy


@contextlib.contextmanager
def proxied(pair: Pair) -> Iterator[tuple[Proxy, dict[str, str]]]:
    """A proxy before the pair's one emulator, and the environment in which a process goes through it."""
    (fixture,) = pair.fixtures
    variable = {"aws": "AWS_ENDPOINT_URL", "gcp": "PUBSUB_EMULATOR_HOST"}[fixture]
    with Proxy(os.environ[variable]) as proxy:
        yield proxy, {variable: proxy.url if fixture == "aws" else proxy.address}


def _slow_and_garbled(proxy: Proxy) -> None:
    proxy.delay(0.2)
    # Of answers alone, at their ends: what is garbled within a message on its way to the broker nobody could notice
    # here. In the cloud there is TLS, which makes a broken connection of either.
    proxy.corrupt(answers_only=True)


FAULTS: dict[str, Callable[[Proxy], None]] = {"cut": Proxy.cut, "hang": Proxy.hang, "garbled": _slow_and_garbled}
