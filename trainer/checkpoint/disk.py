"""File operations for a run folder. Each is complete and on the disk when it returns.

None follows a link: a new file is created under an unpredictable name and then renamed.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def read(path: Path) -> bytes:
    """Return the bytes of a file. A link raises the `OSError` ELOOP, a pipe or device EINVAL."""
    # O_NONBLOCK: opening a pipe must not wait.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # reading a folder raises EISDIR
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read()


def write(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write a new file that contains `parts`, one after the other. Raises `FileExistsError` if there is a file or
    link."""
    file = open(path, "xb")  # noqa: SIM115 - if this fails, the file is not ours to remove
    try:
        with file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # a full disk or a signal: a partial file only takes space
        with suppress(OSError):
            remove(path)
        raise


def publish(path: Path, data: bytes) -> None:
    """Replace `path` atomically: whatever happens, it contains `data` or what it contained before. Files that were
    written before are on the disk first."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    sync_folder(path.parent)
    try:
        write(partial, [data])
        rename(partial, path)
    except BaseException:
        with suppress(OSError):
            remove(partial)
        raise


def remove_partials(folder: Path, names: str) -> None:
    """Remove what killed calls of `publish` left in `folder`, for targets that match the pattern `names`."""
    # Earlier versions wrote no random part.
    partial = re.compile(rf"\.(?:{names})(?:\.[0-9a-f]{{16}})?\.partial")
    for path in folder.iterdir() if folder.is_dir() else ():
        if partial.fullmatch(path.name):
            remove(path)


def rename(source: Path, target: Path) -> None:
    os.replace(source, target)
    sync_folder(target.parent)


def remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.unlink()


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk; syncing a file syncs only its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not support it
            raise
    finally:
        os.close(descriptor)
