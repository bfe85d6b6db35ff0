"""The file operations of a checkpoint, each complete and on the disk when it returns."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def write(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """A new file with `parts` in it, one after the other; nothing that was there is written over."""
    try:
        with open(path, "xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # a full disk: what is there of it only takes room
        remove(path)
        raise


def publish(path: Path, data: bytes) -> None:
    """`path` holds `data` or what it held before, whatever happens; the files written before are on the disk first."""
    partial = path.with_name(f".{path.name}.partial")
    remove(partial)
    sync_folder(path.parent)
    write(partial, [data])
    rename(partial, path)


def rename(source: Path, target: Path) -> None:
    os.replace(source, target)
    sync_folder(target.parent)


def remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.unlink()


def sync_folder(folder: Path) -> None:
    """The names in a folder are on the disk, not only what the files hold."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems know no such thing
            raise
    finally:
        os.close(descriptor)
