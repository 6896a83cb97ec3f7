"""A worker that reaches its broker through a proxy, and what can go wrong there."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from proxy import Proxy


@dataclass(frozen=True)
class Proxied:
    """A proxy before an emulator, and the environment in which a process goes through it."""

    proxy: Proxy
    env: dict[str, str]

    @classmethod
    def before(cls, proxy: Proxy, fixture: str) -> "Proxied":
        """The proxy stands before the emulator of the fixture `aws` or `gcp`."""
        if fixture == "aws":
            return cls(proxy, {"AWS_ENDPOINT_URL": proxy.url})
        return cls(proxy, {"PUBSUB_EMULATOR_HOST": proxy.address})


def upstream(fixture: str) -> str:
    """Where the emulator of the fixture `aws` or `gcp` is."""
    return os.environ["AWS_ENDPOINT_URL" if fixture == "aws" else "PUBSUB_EMULATOR_HOST"]


def _slow_and_garbled(proxy: Proxy) -> None:
    proxy.delay(0.2)
    # Of answers alone, at their ends: what is garbled within a message on its way to the broker nobody could notice
    # here. In the cloud there is TLS, which makes a broken connection of either.
    proxy.corrupt(answers_only=True)


FAULTS: dict[str, Callable[[Proxy], None]] = {"cut": Proxy.cut, "hang": Proxy.hang, "garbled": _slow_and_garbled}
