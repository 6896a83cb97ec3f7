"""S3's event notifications, each record of which is a request of its own.

The format is Amazon's "Event message structure", versions 2.x, of which a later minor version only adds.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any, Final
from urllib.parse import unquote_plus

from rejoinder.schemas.wire import WireError, read_object, write_json

PLACEHOLDERS: Final = ("bucket", "key", "size", "etag", "version_id", "sequencer", "event_name", "event_time")
"""What strings in a template of metadata may contain, in braces."""

_VERSION: Final = re.compile(r"2\.[0-9]{1,9}")
_CREATED: Final = "ObjectCreated:"


@dataclass(frozen=True, slots=True)
class Record:
    """One object that was created. None: the event does not say."""

    bucket: str
    key: str
    """As the object has it, not as the event writes it."""
    event_name: str
    """Such as `ObjectCreated:Put`."""
    size: int | None = None
    """In bytes."""
    etag: str | None = None
    version_id: str | None = None
    sequencer: str | None = None
    event_time: str | None = None

    @property
    def location(self) -> str:
        """Where the object is, as an `input_location`."""
        return f"s3://{self.bucket}/{self.key}"


class TestEvent:
    """What S3 sends once to a queue that it is told to notify: there is nothing to do."""

    __test__ = False  # for pytest, which takes the name for a suite's


def read_event(data: bytes) -> list[Record | WireError] | TestEvent | None:
    """Read the bytes of a message without `metadata` as an event notification.

    Returns:
        For each record what was created, or what is wrong with that record; None if it is no event notification.
    """
    try:
        values, metadata = read_object(data)
    except WireError:
        return None
    if metadata is not None:
        return None
    records = values.get("Records")
    if isinstance(records, list) and records:
        return [_read(record, f"Records.{place}") for place, record in enumerate(records)]
    return TestEvent() if records is None and values.get("Event") == "s3:TestEvent" else None


class _Fields:
    """The fields of one record, each asked for by its path."""

    def __init__(self, record: Any, where: str) -> None:
        self._record = record
        self._where = where

    def wrong(self, path: str, allowed: str) -> WireError:
        """What to say of a field."""
        param = f"{self._where}.{path}"
        return WireError(f"{param} of the S3 event {allowed}", param=param)

    def find(self, path: str) -> Any:
        """The value at `path`; None if there is none."""
        value = self._record
        for step in path.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        return value

    def text(self, path: str) -> str:
        """A text that must be there. Raises WireError."""
        value = self.find(path)
        if not isinstance(value, str) or not value:
            raise self.wrong(path, "should be a text that is not empty")
        return value

    def maybe(self, path: str) -> str | None:
        """A text that may be missing. Raises WireError where it is something else."""
        return None if self.find(path) is None else self.text(path)


def _read(record: Any, where: str) -> Record | WireError:
    try:
        return _record(_Fields(record, where))
    except WireError as exc:
        return exc


def _record(fields: _Fields) -> Record:
    if fields.find("eventSource") != "aws:s3":
        raise fields.wrong("eventSource", f"is {_shown(fields.find('eventSource'))}; only aws:s3 is taken")
    version = fields.find("eventVersion")
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise fields.wrong("eventVersion", f"is {_shown(version)}; only 2.0 and its later minor versions are taken")
    # Its configuration writes `s3:ObjectCreated:Put`, and so do some services of others in the event too.
    name = fields.text("eventName").removeprefix("s3:")
    if not name.startswith(_CREATED):
        raise fields.wrong("eventName", f"is {_shown(name)}; only {_CREATED}* is a request")
    size = fields.find("s3.object.size")
    if size is not None and (type(size) is not int or size < 0):
        raise fields.wrong("s3.object.size", "should be a whole number from 0")
    return Record(
        bucket=fields.text("s3.bucket.name"),
        key=_key(fields),
        event_name=name,
        size=size,
        etag=fields.maybe("s3.object.eTag"),
        version_id=fields.maybe("s3.object.versionId"),
        sequencer=fields.maybe("s3.object.sequencer"),
        event_time=fields.maybe("eventTime"),
    )


def _key(fields: _Fields) -> str:
    """The object's key, which an event writes as a form's value: `red+flower.jpg` for `red flower.jpg`."""
    try:
        return unquote_plus(fields.text("s3.object.key"), errors="strict")
    except UnicodeDecodeError as exc:
        raise fields.wrong("s3.object.key", "should be UTF-8, form-encoded") from exc


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:80] + "..."


def check_template(template: Any) -> str | None:
    """What is wrong with a template of metadata, in one line; None: nothing is."""
    try:
        write_json(template)
    except (ValueError, TypeError) as exc:  # NaN, or a TOML file's date
        return f"s3_event_metadata cannot be written as JSON: {exc}"
    return next((problem for text in _strings(template) if (problem := _bad_text(text))), None)


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for inner in value for text in _strings(inner)]
    return [value] if isinstance(value, str) else []


def _bad_text(text: str) -> str | None:
    try:
        for _, name, spec, conversion in Formatter().parse(text):
            if name is not None and (name not in PLACEHOLDERS or spec or conversion):
                known = ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
                return f"s3_event_metadata has the unknown placeholder {{{name}}} in {text!r}; known are {known}"
    except ValueError as exc:
        return f"s3_event_metadata has {text!r}: {exc}; a brace that is no placeholder is written twice"
    return None


def metadata_of(record: Record, template: Mapping[str, Any]) -> str:
    """The text of the metadata that `template`, which `check_template` has passed, makes for a record.

    A string that is one placeholder becomes its value, so that a size is a number and what is missing is null; inside
    a longer string what is missing is empty.
    """
    values = {name: getattr(record, name) for name in PLACEHOLDERS}
    texts = {name: "" if value is None else value for name, value in values.items()}

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [filled(inner) for inner in value]
        if not isinstance(value, str):
            return value
        if value[:1] == "{" and value[-1:] == "}" and value[1:-1] in values:
            return values[value[1:-1]]
        return value.format_map(texts)

    return write_json(filled(dict(template)))
