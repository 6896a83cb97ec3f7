"""Is a queue in a SQLite file where it should be, readable, writable, on a local disk, and how is it set?

A file that is not there yet is not made: only what the first opener will do is looked at.
"""

import os
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import quote

from rejoinder.adapters.checkup import (
    Checkup,
    Finding,
    advice,
    ask,
    attempts,
    counts,
    fail,
    lease,
    no_dead_letters,
    ok,
    unknown,
)
from rejoinder.adapters.embedded import MAX_BODY, Options
from rejoinder.adapters.errors import AdapterError
from rejoinder.adapters.sqlite import Location, open_subscription, open_topic

NETWORK = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "ceph",
    "afs",
    "lustre",
    "gpfs",
    "beegfs",
    "glusterfs",
    "ocfs2",
}
"""File systems across which SQLite's locks and shared memory do not work; and everything of FUSE but a few."""
LOCAL_FUSE = {"fuseblk", "fuse.ext2", "fuse.zfs", "fuse.fuse-overlayfs"}
FLEETING = {"tmpfs": "at the next boot", "ramfs": "at the next boot", "overlay": "with the container"}
_ESCAPED = re.compile(r"\\(\d{3})")
MOUNTS = Path("/proc/self/mountinfo")
LITTLE_SPACE = 1 << 30
"""The file keeps its largest size, and so does its log: a burst of requests is soon this large."""


async def check_subscription(url: str) -> Checkup:
    """See `rejoinder.adapters.urls.check_subscription`."""
    location = Location.parse(url)
    options = location.options

    async def look() -> list[Finding]:
        async with open_subscription(url) as subscription:
            take = f"rejoinder consume --responses '{_dead_letters(location)}' --timeout 5"
            dead = f"take them out and print them with `{take}`"
            return [_works(location), *counts(await ask(subscription.backlog()), dead)]

    found = [*await _file(location, look), *_settings(options)]
    return Checkup(found, _ends(location), options.max_attempts, max_body=MAX_BODY)


async def check_topic(url: str) -> Checkup:
    """See `rejoinder.adapters.urls.check_topic`."""
    location = Location.parse(url)

    async def look() -> list[Finding]:
        async with open_topic(url):
            return [_works(location)]

    return Checkup(
        [*await _file(location, look), ok("size limit", f"{MAX_BODY} bytes")], _ends(location), max_body=MAX_BODY
    )


def _ends(location: Location) -> frozenset[str]:
    return frozenset({f"queue {location.queue} of {location.path.resolve()}"})


def _settings(options: Options) -> list[Finding]:
    if options.dead_letter is None or options.max_attempts is None:
        policy = no_dead_letters("add &max_attempts=5 to the URL, for all who receive from the queue")
    else:
        policy = attempts(options.max_attempts, f"queue {options.dead_letter}", "set max_attempts=5 in the URL")
    return [
        lease(options.lease, "set lease=60 in the URL"),
        policy,
        ok("retention", "no limit: nothing is deleted but by an ack"),
    ]


def _dead_letters(location: Location) -> str:
    return f"sqlite:///{quote(str(location.path))}?queue={quote(location.options.dead_letter or '')}"


def _works(location: Location) -> Finding:
    return ok("reachable", f"queue {location.queue} of {location.path.resolve()}, readable and writable")


async def _file(location: Location, look: Callable[[], Awaitable[list[Finding]]]) -> list[Finding]:
    path = location.path.resolve()
    if not path.parent.is_dir():
        return [fail("reachable", f"there is no directory {path.parent}", f"mkdir -p '{path.parent}'")]
    if path.exists():
        rights = "give the user that runs this read and write permission for the file and its directory"
        try:
            found = await look()
        except AdapterError as exc:
            found = [
                fail("reachable", str(exc), rights if _refused(path) else "name another file, or move this one away")
            ]
    elif os.access(path.parent, os.W_OK | os.X_OK):
        found = [ok("reachable", f"{path} is not there yet: the first who opens it makes it")]
    else:
        found = [fail("reachable", f"{path.parent} is not writable", f"chown or chmod '{path.parent}'")]
    return [*found, disk(path), _space(path)]


def _refused(path: Path) -> bool:
    return not (os.access(path, os.R_OK | os.W_OK) and os.access(path.parent, os.W_OK | os.X_OK))


def _space(path: Path) -> Finding:
    free = shutil.disk_usage(path.parent).free
    fact = f"{free / 2**30:.1f} GiB free"
    if free < LITTLE_SPACE:
        return advice("disk space", fact, "free some: when the disk is full, publishing fails until it is not")
    return ok("disk space", fact)


def disk(path: Path) -> Finding:
    """Judge the file system that holds `path`."""
    kind = file_system(path, MOUNTS)
    if kind is None:
        return unknown(
            "disk", "this system does not say what file system it is", "it must be a local one, not NFS or SMB"
        )
    if kind in NETWORK or (kind.startswith("fuse.") and kind not in LOCAL_FUSE):
        move = "move it to a local disk; between machines use awssqs:// or gcppubsub://"
        return fail("disk", f"{kind}, a network file system: SQLite's locks do not work across it", move)
    if kind in FLEETING:
        return advice("disk", f"{kind}: all messages are gone {FLEETING[kind]}", "use a volume or directory that stays")
    return ok("disk", f"{kind}, a local file system")


def file_system(path: Path, mounts: Path) -> str | None:
    """Return the type of the file system that holds `path`, by the kernel's table `mounts`; None where it says none."""
    try:
        table = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return None
    best, found = -1, None
    for line in table:
        left, _, right = line.partition(" - ")
        point = Path(_ESCAPED.sub(lambda match: chr(int(match[1], 8)), left.split()[4]))
        if path.is_relative_to(point) and len(point.parts) >= best:  # a later mount hides an earlier one at its place
            best, found = len(point.parts), right.split()[0]
    return found
