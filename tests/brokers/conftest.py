from collections.abc import Iterator

import pytest
from broker_pairs import Pair, pair_of
from outages import Proxied, upstream
from proxy import Proxy


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Pair:
    """The brokers that the test names by `on`."""
    return pair_of(request, request.param)


@pytest.fixture
def proxied(pair: Pair) -> Iterator[Proxied]:
    """A proxy before the pair's one emulator."""
    (fixture,) = pair.fixtures
    with Proxy(upstream(fixture)) as proxy:
        yield Proxied.before(proxy, fixture)
