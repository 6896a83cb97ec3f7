"""Where a producer asks its result to be: parts of an object's key, of which none leads out of the output path."""

import unicodedata

MAX_PART_BYTES = 255
"""Of one part of a key: what file systems take as one name."""
_SCHEMES = ("s3:", "https:")
_PARTS = "it should be parts with a slash between, none of them empty, '.' or '..'"
_FILENAME = "it should be a name with at most one dot, that is not '.', and without a slash"


def check_extension(value: str) -> str:
    """Return `options.output_path_extension` if it stays below the output path.

    Raises:
        ValueError: it may not; says what is allowed.
    """
    if value.lower().startswith(_SCHEMES):
        raise ValueError(f"{_PARTS}, and not begin with s3: or https:")
    for part in value.split("/"):
        _check_part(part, _PARTS)
    return value


def check_filename(value: str) -> str:
    """Return `options.filename` if it is the name of a file.

    Raises:
        ValueError: it is not; says what is allowed.
    """
    if value.count(".") > 1 or "/" in value:
        raise ValueError(_FILENAME)
    _check_part(value, _FILENAME)
    return value


def _check_part(part: str, rule: str) -> None:
    if part in ("", ".", ".."):
        raise ValueError(rule)
    # Cc: control characters. Zl, Zp: line and paragraph separators. Lone surrogates are no text to pydantic.
    if "\\" in part or any(unicodedata.category(char) in {"Cc", "Zl", "Zp"} for char in part):
        raise ValueError(f"{rule}, without backslashes and control characters")
    if len(part.encode()) > MAX_PART_BYTES:
        raise ValueError(f"{rule}, and at most {MAX_PART_BYTES} bytes of UTF-8 in each part")
