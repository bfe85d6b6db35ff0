"""Read files that a user names, if they are regular files of a sensible size."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_file(path: str | Path, *, most_bytes: int) -> bytes:
    """Return the content of a regular file. Raises `OSError`, with a `strerror` in words, for anything else.

    Reading a device may never end, and opening a pipe waits for a writer.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "Is a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise OSError(errno.EINVAL, kind, str(path))
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"larger than {most_bytes:,} bytes", str(path))
    return content


def obstacle(path: str | Path) -> str | None:
    """Return why the file system cannot tell whether `path` exists (too long a name, a loop of links), else None."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # a NUL in the name
        return str(error)
    return None


def folder_obstacle(path: str | Path) -> str | None:
    """Return why the files in a folder cannot be listed and opened, else None; None too if `path` is no folder."""
    if not os.path.isdir(path):
        return None
    try:
        os.listdir(path)
        os.stat(os.path.join(path, os.curdir))  # refused if the folder can be listed and not entered
    except OSError as error:
        return error.strerror or str(error)
    return None
