"""The processes that a test has started."""

import os

import psutil

lasting: set[int] = set()
"""Process groups of what stays for the whole run: the emulators."""
earlier: set[psutil.Process] = set()
"""What was there when the test began, such as a library's helper that an earlier test has started: not its own."""


def children() -> set[psutil.Process]:
    """All processes below this one, dead ones that nobody has waited for included.

    But not those of `lasting`, nor `earlier` ones.
    """
    found = {child for child in psutil.Process().children(recursive=True) if os.getpgid(child.pid) not in lasting}
    return found - earlier


def begin_test() -> None:
    """Count only what is started from now on."""
    earlier.clear()
    earlier.update(psutil.Process().children(recursive=True))
