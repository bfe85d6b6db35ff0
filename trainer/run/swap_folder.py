"""Provide a folder for DeepSpeed's swap files of optimizer state: fresh, for one rank of one run, closed to others.

DeepSpeed names files by rank and parameter alone, so two runs in one folder would read each other's.
"""

from __future__ import annotations

import copy
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def own_swap_folder(ds: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield `ds` with a fresh folder inside its `nvme_path`, which is removed afterwards; without NVMe, `ds` itself.

    Folders that dead runs of this user on this node left there are removed, too.
    """
    offload = ds["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device") != "nvme":
        yield ds
        return
    with fresh_folder(Path(offload["nvme_path"]).expanduser()) as folder:
        ds = copy.deepcopy(ds)
        ds["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(folder)
        yield ds


@contextmanager
def fresh_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent` that only this user can enter, and remove it afterwards.

    A lock on it shows that its process lives, so that folders of killed processes can be recognised.
    """
    # A lock says nothing about processes on other nodes.
    prefix = f"strata-swap-{os.getuid()}-{socket.gethostname()}-"
    parent.mkdir(parents=True, exist_ok=True)
    _remove_dead(parent, prefix)
    folder, descriptor = _make(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _make(parent: Path, prefix: str) -> tuple[Path, int]:
    """Create a folder and lock it. Until it is locked, another run may take it for that of a dead one."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))  # mode 0700
        try:
            descriptor = _open(folder)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # it is about to be removed
            os.close(descriptor)
            continue
        except OSError:  # a file system without locks: no folder there is ever taken for that of a dead run
            return folder, descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(folder.stat(), os.fstat(descriptor)):
                return folder, descriptor
        os.close(descriptor)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _remove_dead(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            descriptor = _open(folder)
            try:
                if os.fstat(descriptor).st_uid == os.getuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if its process lives
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
