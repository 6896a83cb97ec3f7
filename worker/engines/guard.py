"""Ends the processes that an engine has started when the engine process ends, however it ends.

`python -m rejoinder.worker.engines.guard PID`, started by the engine process PID, which leads the process group that
all of them are in. A killed process cannot end its children, and theirs would keep the GPU's memory from the next one.
"""

import os
import select
import signal
import subprocess
import sys


def start() -> subprocess.Popen[bytes] | None:
    """Start this process's guard; the caller keeps what is returned.

    Returns:
        None where this process does not lead its session, as an engine process does, for then its group is not its
        own: a shell puts a whole pipeline into one that the first command leads. And where the system has no pidfd.
    """
    if not hasattr(os, "pidfd_open") or os.getsid(0) != os.getpid():
        return None
    return subprocess.Popen(  # noqa: S603  # our own module
        [sys.executable, "-P", "-m", "rejoinder.worker.engines.guard", str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def main() -> None:
    """Wait for the end of the process, then end its group: the guard itself is in it."""
    leader = int(sys.argv[1])
    if os.getpgrp() != leader:
        sys.exit(f"{leader} does not lead this process group")
    # A service manager signals every process of a group at once; this one ends with the engine process, not before.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        ended = os.pidfd_open(leader)
    except ProcessLookupError:
        pass  # already
    else:
        # A process that is not the parent took the number of one that has ended.
        if os.getppid() == leader:
            select.select([ended], [], [])
    os.killpg(leader, signal.SIGKILL)


if __name__ == "__main__":
    main()
