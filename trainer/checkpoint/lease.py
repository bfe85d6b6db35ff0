"""Let one job at a time write to a run folder.

The lease is a file in the run folder that names its holder. A living holder updates the file's time, so that a job on
another node can tell. A requeued SLURM job takes over the lease of its earlier attempt at once. A stale process of
that attempt, for example on a disconnected node, can no longer publish checkpoints.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError

from trainer.checkpoint import disk
from trainer.checkpoint.store import CheckpointError
from trainer.cluster.process_space import process_space

FILE = "lease.json"
# Locked while the lease is examined; removed with it.
LOCK = ".lease.lock"
_BEAT_SECONDS = 2.0
# A holder that can only be judged by its lease counts as dead after so many looks, a beat apart, that find the lease
# unchanged: half a minute, not counting looks that the file system refused.
_SILENT_LOOKS = 15
# Time limit for the lock; what it protects takes milliseconds.
_LOCK_SECONDS = 10.0


class LeaseError(CheckpointError):
    """The run folder belongs to another job; the message names it."""


@dataclass(frozen=True)
class Holder:
    """Identify who trains in a run folder: a job, its attempt, and rank 0's process."""

    job: str
    restart: int
    place: str  # host and PID namespace
    process: int
    started: str  # when the process started: ID of the boot, and clock ticks since then
    token: str  # unique to this start of training

    def __str__(self) -> str:
        if self == UNKNOWN:
            return f"an unknown run ({FILE} is empty)"
        attempt = f", restart {self.restart}" if self.restart else ""
        return f"{self.job}{attempt} (process {self.process} on {self.place.split()[0]})"


# The holder of a lease that is empty or full of NULs, as after a power cut.
UNKNOWN = Holder("", 0, "", 0, "", "")
_HOLDER = TypeAdapter(Holder)


def this_process(environment: Mapping[str, str] = os.environ) -> Holder:
    """Return the holder that this process would be: its SLURM job, if it has one."""
    process = os.getpid()
    place = process_space()
    slurm = environment.get("SLURM_JOB_ID")
    job = f"SLURM job {slurm}" if slurm else f"process {process} on {place.split()[0]}"
    restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
    return Holder(job, restart, place, process, _birth(process) or "", secrets.token_hex(8))


class Lease:
    """A claim to a run folder, from `take` to `release`; rank 0 has it for all ranks of a run."""

    def __init__(self, folder: Path, holder: Holder) -> None:
        self.folder = folder
        self.holder = holder
        self._path = folder / FILE
        self._inode = 0
        self._taken = False
        self._released = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="lease", daemon=True)

    def take(self) -> Self:
        """Take the folder for the holder, and return this lease. Raises `LeaseError` if another job that lives has it.

        If a signal raises an exception in between, `release` undoes what was done so far.
        """
        before = refuse_taken(self.folder, self.holder)
        with _locked(self.folder):
            if read(self.folder) != before:
                raise LeaseError(f"output: another run just began in {self.folder}: {read(self.folder)}")
            self._taken = True
            disk.publish(self._path, json.dumps(asdict(self.holder)).encode())
            self._inode = self._path.stat().st_ino
        self._beats.start()
        return self

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others from taking the lease while inside. Raises `LeaseError` if another job already has."""
        if not self._taken:
            raise LeaseError(f"{self.folder} was not taken for {self.holder}")
        with _locked(self.folder):
            now = read(self.folder)
            if now != self.holder:
                raise LeaseError(f"{self.folder} belongs to {now or 'nobody'} now, not to {self.holder}")
            yield

    def check(self) -> None:
        """Raise `LeaseError` if another job has taken the lease."""
        with self.held():
            pass

    def release(self) -> bool:
        """Free the folder. Returns False, and leaves it, if it belongs to another job or cannot be freed."""
        if not self._taken:
            return False
        self._released.set()
        if self._beats.is_alive():
            self._beats.join()
        with suppress(LeaseError, OSError), self.held():
            disk.remove(self._path)
            disk.remove(self.folder / LOCK)
            return True
        return False

    def _beat(self) -> None:
        while not self._released.wait(_BEAT_SECONDS):
            with suppress(OSError), open(self._path, "rb") as file:
                # After a takeover the file is another one, whose time this holder must not set.
                if os.fstat(file.fileno()).st_ino == self._inode:
                    os.utime(file.fileno())


def read(folder: Path) -> Holder | None:
    """Return who has the lease of `folder`: `UNKNOWN` if the file is empty, None if there is none. Raises `LeaseError`
    for a file with any other content."""
    path = folder / FILE
    try:
        data = disk.read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.EINVAL, errno.ENXIO):
            raise
        kind = "a link, which is never followed" if error.errno == errno.ELOOP else "not a regular file"
        raise _unreadable(path, kind) from error
    if not data.strip(b"\0 \t\r\n"):
        return UNKNOWN
    try:
        return _HOLDER.validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _unreadable(path, f"{where}: {first['msg']}" if where else first["msg"]) from error


def _unreadable(path: Path, why: str) -> LeaseError:
    return LeaseError(f"{path}: cannot be read ({why}). Remove it if no run trains there")


def refuse_taken(folder: Path, asking: Holder) -> Holder | None:
    """Return the holder of the lease of `folder`, if there is one. Raises `LeaseError` if that holder lives."""
    before = read(folder)
    if before is not None and lives(folder, before, asking):
        raise LeaseError(f"output: another run trains in {folder}: {before}. Wait for its end, or set another output")
    return before


def lives(folder: Path, holder: Holder, asking: Holder) -> bool:
    """Return whether `holder` may still train in `folder`, as far as `asking` can tell. May take half a minute."""
    if holder.job == asking.job and holder.restart < asking.restart:
        return False  # the scheduler ended it, even if a process of it is left
    # Two nodes may share a name (`localhost`), but not a boot.
    if holder.place == asking.place and _boot(holder) == _boot(asking):
        runs = _runs(holder)
        if runs is not None:
            return runs
    return _shows_life(folder)


def _runs(holder: Holder) -> bool | None:
    """Return whether the process of `holder`, on this node, runs, or None if that cannot be seen. A stopped process
    runs. One that has ended does not, although its number is in use until its parent asks for its exit code, which the
    first process of some containers never does."""
    try:
        os.kill(holder.process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it belongs to another user
    born = _birth(holder.process)
    if born is None:
        return None
    return born == holder.started and _has_living_threads(holder.process)


def _has_living_threads(process: int) -> bool:
    """Return whether any thread of `process` has not ended. The first one may end before the others."""
    for task in Path(f"/proc/{process}/task").glob("*"):
        with suppress(OSError, IndexError):
            if _status(task)[0] not in "ZXx":
                return True
    return False


def _shows_life(folder: Path) -> bool:
    """Return whether the time of the lease changes while this process watches."""
    seen, looks = _time(folder), 0
    while seen is not None and looks < _SILENT_LOOKS:
        time.sleep(_BEAT_SECONDS)
        try:
            now = _time(folder)
        except OSError:  # the file system failed: no look
            continue
        if now != seen:
            return now is not None
        looks += 1
    return False


def _boot(holder: Holder) -> str:
    return holder.started.partition(" ")[0]


def _birth(process: int) -> str | None:
    """Return when a process of this node started, independent of changes to the clock; None if it cannot be seen."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {_status(Path(f'/proc/{process}'))[19]}"
    except (OSError, IndexError):
        return None


def _status(process: Path) -> list[str]:
    """Return the fields after the name of a process or thread in /proc: its state is the first, its start the 20th
    (proc(5) also counts number and name: 3 and 22)."""
    # The name is in brackets and may contain anything.
    return (process / "stat").read_bytes().rpartition(b")")[2].decode("ascii", "replace").split()


def _time(folder: Path) -> int | None:
    try:
        with open(folder / FILE, "rb") as file:  # opened, so that NFS asks its server
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time in, if the file system has locks."""
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        descriptor = _open_lock(folder / LOCK)
        try:
            # A stalled holder must not block the others.
            if _lock(descriptor, until=end) and not _is_file(folder / LOCK, descriptor) and time.monotonic() < end:
                continue  # the run that held it has removed it
            yield
            return
        finally:
            os.close(descriptor)


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise LeaseError(f"{path}: a link, which is never followed. Remove it") from error
        if error.errno in (errno.EISDIR, errno.ENXIO):
            raise LeaseError(f"{path}: not a regular file. Remove it") from error
        raise


def _lock(descriptor: int, *, until: float) -> bool:
    """Return whether the lock was taken: False if the file system has no locks, or after `until`."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        except OSError:
            return False


def _is_file(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False
