"""S3's event notifications as requests: each object that was created is the input of one."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rejoinder.schemas.envelope import ParsedRequest
from rejoinder.schemas.s3_events import Record, TestEvent, metadata_of, read_event
from rejoinder.schemas.wire import WireError
from rejoinder.worker.accepting import Events
from rejoinder.worker.settings import Settings


def events_of(settings: Settings) -> Events | None:
    """How the settings want events to be read; None: not at all."""
    if settings.s3_event_path is None:
        return None
    return partial(_requests, settings.s3_event_path, settings.s3_event_metadata)


def _requests(path: str, template: Mapping[str, Any], body: bytes) -> Sequence[ParsedRequest | WireError] | None:
    records = read_event(body)
    if isinstance(records, TestEvent):
        return ()
    if records is None:
        return None
    return [record if isinstance(record, WireError) else _request(path, template, record) for record in records]


def _request(path: str, template: Mapping[str, Any], record: Record) -> ParsedRequest:
    return ParsedRequest(path, None, record.location, None, metadata_of(record, template))
