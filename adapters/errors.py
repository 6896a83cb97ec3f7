"""What a broker or a store can answer besides success.

    AdapterError
    ├── Transient   the broker is away, busy or throttling: the same call may succeed later
    ├── Denied      the credentials do not allow it
    ├── NotFound    the queue, topic, subscription, file, bucket or object is not there
    ├── TooLarge    the message or object is larger than the broker or store carries
    ├── Refused     the broker does not take this one message, whatever it takes else (also a ValueError)
    ├── LeaseLost   the lease of this delivery has passed to somebody else, or the message is gone
    └── BadURL      the URL names no adapter, or names it wrongly (also a ValueError)

An adapter maps its vendor's exceptions to these once, at its boundary, with `raise ... from exc`. It never retries:
policy sits above it.
"""


class AdapterError(Exception):
    """Base of everything that an adapter raises or returns as an outcome."""


class Transient(AdapterError):
    """The broker is away, busy or throttling: the same call may succeed later."""


class Denied(AdapterError):
    """The credentials do not allow it."""


class NotFound(AdapterError):
    """The queue, topic, subscription or file is not there."""


class TooLarge(AdapterError):
    """The message is larger than the broker carries."""


class Refused(AdapterError, ValueError):
    """The broker does not take this one message, whatever it takes else."""


class LeaseLost(AdapterError):
    """The lease of this delivery has passed to somebody else, or the message is gone."""


class BadURL(AdapterError, ValueError):
    """The URL names no adapter, or names it wrongly."""
