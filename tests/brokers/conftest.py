import pytest
from broker_pairs import Pair, pair_of


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Pair:
    """The brokers that the test names by `on`."""
    return pair_of(request, request.param)
