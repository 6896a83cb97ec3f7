"""What the objects of one answer are called: the same on every delivery, and never the name of another answer's."""

import hashlib
import re

from rejoinder.schemas.envelope import Options
from rejoinder.worker.errors import BadRequest

# What every store, file system and shell takes as it is. Names that begin with a dot are hidden, or lead elsewhere.
_SAFE = re.compile(r"(?!\.)[A-Za-z0-9_.-]{1,64}")
_FOLDER = ".d"
_RESULT = ".out"


def object_name(response_id: str) -> str:
    """`response_id` as a part of a key: unchanged where it can be, else its SHA-256 in hexadecimal."""
    return response_id if _SAFE.fullmatch(response_id) else hashlib.sha256(response_id.encode()).hexdigest()


def record_key(response_id: str) -> str:
    """The key of what is kept as a response: in the ledger, and of a failure."""
    return f"{object_name(response_id)}.json"


def output_key(response_id: str, options: Options) -> str:
    """The key of a result below the output path.

    `NAME.out`, or with a filename `NAME.d/FILENAME`, below the extension if there is one. The name stays in the path,
    so that two answers never share an object, whatever their senders ask for.

    Raises:
        BadRequest: the extension could make it the key of another answer, or a part of it a directory where one is.
    """
    name = object_name(response_id)
    last = f"{name}{_RESULT}" if options.filename is None else f"{name}{_FOLDER}/{options.filename}"
    extension = options.output_path_extension
    if extension is None:
        return last
    if any(part.lower().endswith((_FOLDER, _RESULT)) for part in extension.split("/")):
        raise BadRequest(
            f"no part of options.output_path_extension may end with {_FOLDER} or {_RESULT}, as the names of results do",
            param="options.output_path_extension",
        )
    return f"{extension}/{last}"
