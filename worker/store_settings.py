"""What settings of stores, notices and S3 events need of each other: one that would be ignored is refused."""

from typing import Any

from rejoinder.adapters.urls import STORES
from rejoinder.schemas.s3_events import check_template

_STORES = ("blobs", "output_path", "failure_path", "ledger", "cancels")
_NEEDS: dict[str, tuple[str, ...]] = {
    "max_inline_bytes": ("blobs", "output_path"),
    "max_input_bytes": ("blobs", "allow_input"),
    "s3_event_path": ("blobs", "allow_input"),
    "s3_event_metadata": ("s3_event_path",),
    "extended_client": ("blobs",),
    "include_inference_response": ("success_topic", "error_topic"),
    "endpoint_name": ("success_topic", "error_topic"),
}
"""A setting that somebody set has a meaning only with one of these."""


def store_problem(settings: Any) -> str | None:
    """What of stores, notices and S3 events cannot be in the worker's `Settings`, in one line; None: all can."""
    for name in _STORES:
        if (url := getattr(settings, name)) is not None and (problem := _bad_url(url)):
            return f"{name} is {url!r}: {problem}"
    for url in settings.allow_input:
        if problem := _bad_url(url):
            return f"allow_input has {url!r}: {problem}"
    for name, others in _NEEDS.items():
        if _asked(settings, name) and not any(getattr(settings, other) for other in others):
            return f"{name} has no meaning without {' or '.join(others)}: name one, or leave it out"
    return _no_pointers(settings) or _no_notices(settings) or check_template(settings.s3_event_metadata)


def _asked(settings: Any, name: str) -> bool:
    return name in settings.model_fields_set and getattr(settings, name) not in (None, False)


def _bad_url(url: str) -> str | None:
    scheme, sep, rest = url.partition("://")
    known = ", ".join(f"{name}://" for name in STORES)
    if not sep or scheme not in STORES:
        return f"it should be the URL of a store: {known}"
    bare = rest.partition("?")[0]
    if not bare.strip("/"):
        return "it names nothing after its scheme, such as s3://bucket/prefix or file:///directory"
    if scheme == "file" and not bare.startswith("/"):
        return "a directory is absolute, with three slashes: file:///directory"
    return None


def _no_pointers(settings: Any) -> str | None:
    """Pointers are a convention of SQS, and name objects on S3 only."""
    if not settings.extended_client:
        return None
    if not settings.responses.startswith("awssqs://"):
        return f"extended_client is for responses on awssqs://, and they go to {settings.responses!r}"
    if not settings.blobs.startswith("s3://"):
        return f"extended_client points to objects on S3, and blobs is {settings.blobs!r}"
    return None


def _no_notices(settings: Any) -> str | None:
    for name in ("success_topic", "error_topic"):
        url = getattr(settings, name)
        for other in ("requests", "responses"):
            if url is not None and url == getattr(settings, other):
                return f"{name} is {url!r}, where the {other} are: notices would be taken for {other}"
    return None
