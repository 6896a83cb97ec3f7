"""Which attempt a delivery is, where the broker does not say."""

from collections import OrderedDict

from rejoinder.adapters import Message

REMEMBERED = 100_000
"""Messages whose failures are remembered; the longest ago are forgotten first. About 20 MB at worst."""


class Attempts:
    """Counts the failures that this worker has seen of each message, until it is answered.

    A lower bound: other workers' failures, and those before a restart, are not known. So a message that always fails is
    answered after at most `max_attempts` failures on each worker. What the broker says goes before it, for each
    delivery by itself, since a broker may count the later ones only.

    Args:
        limit: Messages remembered.
    """

    def __init__(self, limit: int = REMEMBERED) -> None:
        self._limit = limit
        self._failures: OrderedDict[str, int] = OrderedDict()

    def of(self, message: Message) -> int:
        """Which delivery this is, from 1: at least, where the broker does not count."""
        return message.attempt if message.attempt is not None else self._failures.get(message.id, 0) + 1

    def failed(self, message: Message) -> None:
        """This delivery failed, and the message comes back."""
        count = self.of(message)
        self._failures.pop(message.id, None)
        self._failures[message.id] = count
        if len(self._failures) > self._limit:
            self._failures.popitem(last=False)

    def answered(self, message: Message) -> None:
        """Forget it."""
        self._failures.pop(message.id, None)
