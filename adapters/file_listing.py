"""The objects of `file://`, by walking its directory. Blocks: `file_store` calls it in threads."""

import contextlib
import os
import stat
from collections.abc import Generator

from rejoinder.adapters import blobs
from rejoinder.adapters.driver import Listed
from rejoinder.adapters.errors import Denied
from rejoinder.adapters.file_objects import DIRECTORY, UNFINISHED, mapped


def listed(root: str, after: str) -> Generator[Listed, None, None]:
    """The regular files below `root` whose keys are greater than `after`. Raises as `BlobStore.list`."""
    with mapped(f"file://{root}", writing=True):
        try:
            folder = os.open(os.path.realpath(root), DIRECTORY)
        except FileNotFoundError:
            return
        except NotADirectoryError as exc:
            raise Denied(f"file://{root}: the store's directory is a file, or below one") from exc
        yield from _below(folder, "", after)


def _below(folder: int, path: str, after: str) -> Generator[Listed, None, None]:
    """Those of an open directory, which is closed then, and of those in it. Follows no link: none leads out."""
    try:
        inner: list[str] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(UNFINISHED):
                    continue
                # What is gone by now was removed meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    # Both are known of an entry without asking for it, which costs six times as much as its name.
                    if entry.is_dir(follow_symlinks=False):
                        inner.append(entry.name)
                    elif (key := path + entry.name) > after and blobs.key_of(key, "") is not None:
                        status = os.stat(entry.name, dir_fd=folder, follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            yield Listed(key, status.st_mtime)
        for name in inner:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                yield from _below(os.open(name, DIRECTORY, dir_fd=folder), f"{path}{name}/", after)
    finally:
        os.close(folder)
