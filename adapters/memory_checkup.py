"""What can be said of `memory://`: that nobody else sees it."""

from rejoinder.adapters.checkup import Checkup, fail
from rejoinder.adapters.memory import open_subscription, open_topic


async def check_subscription(url: str) -> Checkup:
    """See `rejoinder.adapters.urls.check_subscription`."""
    async with open_subscription(url):  # for what is wrong with the URL
        return _only_here(url)


async def check_topic(url: str) -> Checkup:
    """See `rejoinder.adapters.urls.check_topic`."""
    async with open_topic(url):
        return _only_here(url)


def _only_here(url: str) -> Checkup:
    fact = f"{url} is inside one process and gone with it: no other process can see it"
    todo = "for one machine use sqlite:///work.db?queue=NAME, for tests keep it in one process"
    return Checkup([fail("reachable", fact, todo)])
