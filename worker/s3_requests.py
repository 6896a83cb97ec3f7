"""S3's event notifications as requests: each object that was created is the input of one."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import structlog

from rejoinder.schemas.envelope import ParsedRequest
from rejoinder.schemas.s3_events import Record, TestEvent, metadata_of, read_event
from rejoinder.schemas.wire import WireError
from rejoinder.worker.accepting import Events
from rejoinder.worker.settings import Settings

log = structlog.get_logger(__name__)


def events_of(settings: Settings, is_own: Callable[[str], bool]) -> Events:
    """How the settings want events to be read.

    Args:
        settings: The worker's.
        is_own: Whether the object at a location is one that the worker writes.
    """
    if settings.s3_event_path is None:
        return _refusal
    return partial(_requests, settings.s3_event_path, settings.s3_event_metadata, is_own)


def _refusal(body: bytes) -> Sequence[WireError] | None:
    if read_event(body) is None:
        return None
    return [WireError("metadata is missing: this is an S3 event, and s3_event_path is not set", param="metadata")]


def _requests(
    path: str, template: Mapping[str, Any], is_own: Callable[[str], bool], body: bytes
) -> Sequence[ParsedRequest | WireError | None] | None:
    records = read_event(body)
    if isinstance(records, TestEvent):
        return ()
    if records is None:
        return None
    return [record if isinstance(record, WireError) else _request(path, template, is_own, record) for record in records]


def _request(
    path: str, template: Mapping[str, Any], is_own: Callable[[str], bool], record: Record
) -> ParsedRequest | None:
    if is_own(record.location):
        # Its answer would be such an object too, and so on without end.
        log.info("s3_event_ignored", location=record.location, reason="the worker writes there itself")
        return None
    return ParsedRequest(path, None, record.location, None, metadata_of(record, template))
