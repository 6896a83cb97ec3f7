"""Where a request's cancel mark is: what the worker that looks for it and the client that leaves it must agree on.

A mark is an object in a store that is for marks alone. Its key is when it was left, by the clock of who left it, and
then the `mark_name` of a message id or an `inference_id`: `1795352463000-doc-17`. So new marks come last in the order
of keys, and are listed without the old ones.
"""

import os
import re

from rejoinder.adapters.blobs import below, object_name

FOLDER = "cancels"
_KEY = re.compile(r"[0-9]{13}-(.+)")


def mark_name(request_id: str) -> str:
    """What all marks of the requests are called that have this message id or `inference_id`."""
    return object_name(request_id)


def mark_key(request_id: str, at: float) -> str:
    """The key of such a mark that is left at `at`, seconds since the epoch."""
    return f"{_stamp(at)}-{mark_name(request_id)}"


def name_of(key: str) -> str | None:
    """The `mark_name` in a key; None: that is no mark's."""
    found = _KEY.fullmatch(key)
    return None if found is None or object_name(found[1]) != found[1] else found[1]


def before(at: float) -> str:
    """What is less than the keys of all marks that are left at `at` or later."""
    return _stamp(at)


def _stamp(at: float) -> str:
    return f"{int(max(at, 0.0) * 1000):013d}"


def marks_url(requests: str | None, cancels: str | None, blobs: str | None) -> str | None:
    """The URL of the store of marks; None where the settings name none.

    Args:
        requests: URL of the requests' queue: what of a broker is a file, or in this process, has its marks beside it.
        cancels: URL of the store itself, if somebody named it.
        blobs: URL of the store for large results.

    Raises:
        BadURL: `requests` names its file wrongly.
    """
    if cancels is not None:
        return cancels
    scheme, _, rest = (requests or "").partition("://")
    if scheme == "memory":
        return f"memory://{rest.partition('?')[0]}/{FOLDER}"
    beside = _beside(requests) if requests is not None and scheme == "sqlite" else None
    return below(blobs, FOLDER) if beside is None and blobs is not None else beside


def sqlite_file(requests: str) -> str:
    """The file of a sqlite:// queue: its absolute path, links followed. Raises BadURL."""
    from rejoinder.adapters.sqlite import Location  # noqa: PLC0415 - only where it is the broker

    return os.path.realpath(Location.parse(requests).path)


def _beside(requests: str) -> str | None:
    path = sqlite_file(requests)
    # A store's URL is taken as it stands: there is none for a directory whose name has what ends a path there.
    return None if set("?#") & set(path) or not path.isprintable() else f"file://{path}.{FOLDER}/"
