"""Brokers and blob stores as bytes: one small contract (`driver`) and its adapters.

`open_subscription`, `open_topic` and `open_blobs` are the one way in, for the worker, the client and anybody's script.
`check_subscription` and `check_topic` look at what a URL names without touching a message.
"""

from rejoinder.adapters.checkup import Checkup, Finding
from rejoinder.adapters.driver import Backlog, Blob, BlobStore, Listed, Message, Outgoing, Subscription, Topic
from rejoinder.adapters.errors import (
    AdapterError,
    BadURL,
    Denied,
    LeaseLost,
    NotFound,
    Refused,
    TooLarge,
    Transient,
)
from rejoinder.adapters.urls import check_subscription, check_topic, open_blobs, open_subscription, open_topic

__all__ = [
    "AdapterError",
    "Backlog",
    "BadURL",
    "Blob",
    "BlobStore",
    "Checkup",
    "Denied",
    "Finding",
    "LeaseLost",
    "Listed",
    "Message",
    "NotFound",
    "Outgoing",
    "Refused",
    "Subscription",
    "TooLarge",
    "Topic",
    "Transient",
    "check_subscription",
    "check_topic",
    "open_blobs",
    "open_subscription",
    "open_topic",
]
