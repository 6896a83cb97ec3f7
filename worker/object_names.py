"""What the objects of one answer are called: the same on every delivery, and never the name of another answer's."""

from rejoinder.adapters.blobs import object_name
from rejoinder.schemas.envelope import Options
from rejoinder.worker.errors import BadRequest

_FOLDER = ".d"
_RESULT = ".out"


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
