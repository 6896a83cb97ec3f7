"""docs/settings.md, made from the settings themselves: run this file to write it."""

import json
from pathlib import Path
from typing import get_args

from rejoinder.worker.settings import Settings

HEAD = """# Settings of the worker

A flag beats its environment variable, which beats `rejoinder.toml` (in the working directory, or `--config FILE`),
which beats the default. `rejoinder config` shows each setting, its value and where it comes from. Times are seconds,
sizes bytes, lengths tokens.

The flag of `max_attempts` is `--max-attempts`, its variable `REJOINDER_MAX_ATTEMPTS`, its key in the file
`max_attempts`.

| setting | default | what it is |
|---|---|---|
"""


def page() -> str:
    """The page's text."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = "required" if field.is_required() else field.default
        text = json.dumps(default) if isinstance(default, bool | dict) else default
        shown = "" if default in (None, []) else f"`{text}`"
        choices = [member for member in get_args(field.annotation) if isinstance(member, str)]
        text = field.description or ""
        if choices:
            text += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
        rows.append(f"| `{name}` | {shown.replace('`required`', 'required')} | {text} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    (Path(__file__).parents[2] / "docs" / "settings.md").write_text(page())
