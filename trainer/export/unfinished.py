"""Write a folder that appears complete or not at all, also if several processes write it at the same time."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

from trainer.checkpoint import disk

_LOCK = ".lock"


class Unfinished:
    """A folder beside `folder`, to write into. It is locked as long as its process lives, which distinguishes it from
    leftovers of killed processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        while True:
            self.path = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
            self.path.mkdir()
            # Another process may have taken the new folder, not locked yet, for a leftover.
            try:
                self._lock = open(self.path / _LOCK, "wb")  # noqa: SIM115 - open until `close`
            except FileNotFoundError:
                continue
            if _try_lock(self._lock) and (self.path / _LOCK).exists():
                return
            self._lock.close()

    def publish(self, *, replace: bool) -> None:
        """Give it its final name. What has that name is removed if `replace`; otherwise it must be an empty folder, or
        `FileExistsError` is raised."""
        for path in [*self.path.rglob("*"), self.path]:
            disk.sync_folder(path)
        if replace:
            shutil.rmtree(self._folder, ignore_errors=True)
        try:
            os.rename(self.path, self._folder)
        except OSError as error:  # ENOTEMPTY, EEXIST, ENOTDIR
            if os.path.lexists(self._folder):
                raise FileExistsError(f"{self._folder}: was created by another process in the meantime") from error
            raise
        disk.remove(self._folder / _LOCK)  # only now: without it, others would take the folder for a leftover
        disk.sync_folder(self._folder)
        disk.sync_folder(self._folder.parent)

    def remove(self) -> None:
        """Remove the folder if it was not published."""
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def _remove_leftovers(self) -> None:
        for left in self._folder.parent.glob(f"{_escaped(self._folder.name)}.????????.partial"):
            with suppress(FileNotFoundError):
                with open(left / _LOCK, "r+b") as lock:
                    if not _try_lock(lock):
                        continue
                    shutil.rmtree(left, ignore_errors=True)
            shutil.rmtree(left, ignore_errors=True)  # without a lock, no process writes there


def clear_up(folder: Path) -> None:
    """Remove what a process that was killed while publishing left in `folder`."""
    if not folder.is_symlink():
        disk.remove(folder / _LOCK)


def _try_lock(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        return True
    return True


def _escaped(name: str) -> str:
    """Return a dot and `name`, escaped for `glob`."""
    return "." + "".join(f"[{character}]" if character in "*?[" else character for character in name)
