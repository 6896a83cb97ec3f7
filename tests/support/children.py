"""The processes that a test has started."""

import os

import psutil

lasting: set[int] = set()
"""Process groups of what stays for the whole run: the emulators."""


def children() -> set[psutil.Process]:
    """All processes below this one, dead ones that nobody has waited for included, but not those of `lasting`."""
    return {child for child in psutil.Process().children(recursive=True) if os.getpgid(child.pid) not in lasting}
