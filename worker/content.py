"""What an input object is read as: a JSON value, lines of them, or text."""

import enum
from email.message import Message as Header

from rejoinder.worker.errors import BadRequest


class Form(enum.Enum):
    """How an object's bytes become a body."""

    JSON = enum.auto()
    LINES = enum.auto()
    """Each line is a body of its own."""
    TEXT = enum.auto()
    """The body is a string."""


LINES = "application/jsonl"
"""The content type of JSON lines that we write. There is no registered one."""
_TYPES = {
    "application/json": Form.JSON,
    LINES: Form.LINES,
    "application/jsonlines": Form.LINES,
    "application/x-jsonlines": Form.LINES,
    "application/x-ndjson": Form.LINES,
}
_EXTENSIONS = {"json": Form.JSON, "jsonl": Form.LINES, "ndjson": Form.LINES, "txt": Form.TEXT}
# What stores and their clients say of an object of which they were told nothing. text/plain is Google's client's word.
_GENERIC = {"", "application/octet-stream", "binary/octet-stream"}
_WEAK = {*_GENERIC, "text/plain"}
_UTF_8 = {"", "utf-8", "utf8", "us-ascii"}


def form_of(key: str, asked: str | None, stored: str | None) -> Form:
    """What to read an object as.

    Args:
        key: Its key, whose extension counts where nothing better is known. JSON where that tells nothing either.
        asked: `options.content_type`, which counts first.
        stored: What the store says.

    Raises:
        BadRequest: it is nothing that can be read.
    """
    kind, _ = _parsed(asked or stored or "")
    by_name = _EXTENSIONS.get(key.rpartition("/")[2].rpartition(".")[2].lower())
    if asked is None and (kind in _GENERIC or (kind in _WEAK and by_name is not None)):
        return by_name or Form.JSON
    return _form(asked or stored or "", "input_location" if asked is None else "options.content_type")


def _form(content_type: str, param: str) -> Form:
    kind, charset = _parsed(content_type)
    form = Form.TEXT if kind.startswith("text/") else _TYPES.get(kind)
    if form is None:
        taken = f"{', '.join(_TYPES)} and text/*"
        raise BadRequest(f"content_type {content_type!r} of the input is not supported; taken are {taken}", param=param)
    if charset not in _UTF_8:
        raise BadRequest(f"content_type {content_type!r} of the input: only UTF-8 is read", param=param)
    return form


def _parsed(content_type: str) -> tuple[str, str]:
    """The media type and the charset, in small letters."""
    header = Header()
    header["content-type"] = content_type
    kind = content_type.partition(";")[0].strip().lower()
    return kind, str(header.get_param("charset", "")).lower()
