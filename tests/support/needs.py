"""Which of several things a test runs against: those that can do what it needs. A case that cannot be is not made."""

from collections.abc import Iterable
from typing import Any

import pytest


def needs(*abilities: str) -> pytest.MarkDecorator:
    """Run the test only against what has all these attributes."""
    return pytest.mark.needs(*abilities)


def able(metafunc: pytest.Metafunc, things: Iterable[Any]) -> list[Any]:
    """Those that have what the test needs."""
    abilities = [ability for mark in metafunc.definition.iter_markers("needs") for ability in mark.args]
    return [thing for thing in things if all(getattr(thing, ability) for ability in abilities)]
