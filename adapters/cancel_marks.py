"""Where a request's cancel mark is: what the worker that looks for it and the client that leaves it must agree on.

A mark is an object whose key is `mark_key` of a message id or an `inference_id`, in a store that is for marks alone.
"""

import os

from rejoinder.adapters.blobs import below, object_name

FOLDER = "cancels"


def mark_key(request_id: str) -> str:
    """The key of the mark of the requests that have this message id or `inference_id`."""
    return object_name(request_id)


def marks_url(requests: str | None, cancels: str | None, blobs: str | None) -> str | None:
    """The URL of the store of marks; None where the settings name none, and the requests' broker is no file.

    Args:
        requests: URL of the requests' queue.
        cancels: URL of the store itself, if somebody named it.
        blobs: URL of the store for large results.

    Raises:
        BadURL: `requests` names its file wrongly.
    """
    if cancels is not None:
        return cancels
    if blobs is not None:
        return below(blobs, FOLDER)
    scheme, _, rest = (requests or "").partition("://")
    if scheme == "memory":
        return f"memory://{rest.partition('?')[0]}/{FOLDER}"
    return _beside(requests) if requests is not None and scheme == "sqlite" else None


def sqlite_file(requests: str) -> str:
    """The file of a sqlite:// queue: its absolute path, links followed. Raises BadURL."""
    from rejoinder.adapters.sqlite import Location  # noqa: PLC0415 - only where it is the broker

    return os.path.realpath(Location.parse(requests).path)


def _beside(requests: str) -> str | None:
    path = sqlite_file(requests)
    # A store's URL is taken as it stands: there is none for a directory whose name has what ends a path there.
    return None if set("?#") & set(path) or not path.isprintable() else f"file://{path}.{FOLDER}/"
