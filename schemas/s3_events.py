"""S3's event notifications, each record of which is a request of its own."""

from string import Formatter
from typing import Any

PLACEHOLDERS = ("bucket", "key", "size", "etag", "version_id", "sequencer", "event_name", "event_time")
"""What strings in a template of metadata may contain, in braces."""


def check_template(template: Any) -> str | None:
    """What is wrong with a template of metadata, in one line; None: nothing is."""
    if isinstance(template, dict):
        template = list(template.values())
    if isinstance(template, list):
        return next((problem for value in template if (problem := check_template(value))), None)
    if not isinstance(template, str):
        return None
    try:
        for _, name, spec, conversion in Formatter().parse(template):
            if name is not None and (name not in PLACEHOLDERS or spec or conversion):
                known = ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
                return f"s3_event_metadata has the unknown placeholder {{{name}}} in {template!r}; known are {known}"
    except ValueError as exc:
        return f"s3_event_metadata has {template!r}: {exc}; a brace that is no placeholder is written twice"
    return None
