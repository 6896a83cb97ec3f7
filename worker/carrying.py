"""What goes beside a response's body, in the form that every broker carries."""

import hashlib
import re

# The values that `rejoinder.adapters.driver.Outgoing` allows, less what XML cannot write: U+FFFE and U+FFFF.
_VALUE = re.compile(r"[\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]+")
_VALUE_BYTES = 1024
# Ordering keys and deduplication ids: SQS allows letters, digits and punctuation, but no space.
_NAME = re.compile(r"[\x21-\x7e]{1,128}")
# https://www.w3.org/TR/trace-context/#traceparent-header. A later version may have more after another dash.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:(?<!^00.{53})-[\x21-\x7e]{0,200})?"
)


def attribute(value: str) -> str:
    """`value` as an attribute can carry it: unchanged where it can be, else its SHA-256 in hexadecimal."""
    if value.isascii() and value.isprintable() and 0 < len(value) <= _VALUE_BYTES:  # the usual case
        return value
    if _VALUE.fullmatch(value) and len(value.encode()) <= _VALUE_BYTES:
        return value
    return _hashed(value)


def name(value: str) -> str:
    """`value` as an ordering key or deduplication id: unchanged where it can be, else its SHA-256 in hexadecimal.

    The same value always gives the same name, so that what belongs together stays together.
    """
    return value if _NAME.fullmatch(value) else _hashed(value)


def traceparent(value: str | None) -> str | None:
    """`value` if it is a trace context; None for anything else, which is not passed on."""
    return value if value is not None and _TRACEPARENT.fullmatch(value) else None


def _hashed(value: str) -> str:
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()
