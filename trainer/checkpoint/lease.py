"""One writer: which job a run folder belongs to while it trains there.

The lease is a file in the run folder that names its holder. A holder that lives shows it by the file's time, so that
a job on another machine can tell. The same SLURM job, requeued, takes the lease over at once; whoever held it before
cannot publish a checkpoint any more, should one of its processes still live (a node that was cut off and comes back).
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.checkpoint import disk
from trainer.checkpoint.store import CheckpointError

FILE = "lease.json"
# What is locked while the lease is looked at; it goes with the run.
LOCK = ".lease.lock"
_BEAT_SECONDS = 2.0
# How many looks, a beat apart, must find a lease as it was until its holder, of which nothing else is known, counts as
# dead: half a minute in which this process could look, whatever the file system did meanwhile.
_SILENT_LOOKS = 15
# For the lock around a look at the lease and what follows from it: both take milliseconds.
_LOCK_SECONDS = 10.0


class LeaseError(CheckpointError):
    """The run folder belongs to another job; the message names it."""


@dataclass(frozen=True)
class Holder:
    """Who trains in a run folder: a job, which attempt of it, and rank 0's process."""

    job: str
    restart: int
    place: str  # host and PID namespace
    process: int
    started: str  # when the process did: boot and clock ticks since then
    token: str  # of this start of training

    def __str__(self) -> str:
        attempt = f", restart {self.restart}" if self.restart else ""
        return f"{self.job}{attempt} (process {self.process} on {self.place.split()[0]})"


def this_process(environment: Mapping[str, str] = os.environ) -> Holder:
    """The holder that this process would be: its SLURM job where it has one."""
    process = os.getpid()
    place = _place()
    slurm = environment.get("SLURM_JOB_ID")
    job = f"SLURM job {slurm}" if slurm else f"process {process} on {place.split()[0]}"
    restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
    return Holder(job, restart, place, process, _birth(process) or "", secrets.token_hex(8))


class Lease:
    """Held from `take` to `release`, by rank 0 for all ranks of a run."""

    def __init__(self, folder: Path, holder: Holder) -> None:
        self.folder = folder
        self.holder = holder
        self._path = folder / FILE
        self._released = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="lease", daemon=True)

    @classmethod
    def take(cls, folder: Path, holder: Holder) -> Lease:
        """The lease of `folder` for `holder`; raises `LeaseError` where another job that lives has it."""
        lease = cls(folder, holder)
        before = read(folder)
        if before is not None and lives(folder, before, holder):
            raise LeaseError(
                f"output: another run trains in {folder}: {before}. Wait for its end, or set another output"
            )
        with _locked(folder):
            if read(folder) != before:
                raise LeaseError(f"output: another run began in {folder} at this moment: {read(folder)}")
            disk.publish(lease._path, json.dumps(asdict(holder)).encode())
        lease._beats.start()
        return lease

    @contextmanager
    def held(self) -> Iterator[None]:
        """While inside, nobody else can take the lease; raises `LeaseError` where somebody has."""
        with _locked(self.folder):
            now = read(self.folder)
            if now != self.holder:
                raise LeaseError(f"{self.folder} belongs to {now or 'nobody'} now, not to {self.holder}")
            yield

    def check(self) -> None:
        """Raise `LeaseError` where somebody else has it."""
        with self.held():
            pass

    def release(self) -> bool:
        """The folder is free; False, and nothing happens, where it belongs to somebody else by now."""
        self._released.set()
        if self._beats.is_alive():
            self._beats.join()
        with suppress(LeaseError, OSError), self.held():
            disk.remove(self._path)
            disk.remove(self.folder / LOCK)
            return True
        return False

    def _beat(self) -> None:
        # The same file throughout: once somebody else has taken over, it is not the one that they look at.
        own = self._path.stat().st_ino
        while not self._released.wait(_BEAT_SECONDS):
            with suppress(OSError), open(self._path, "rb") as file:
                if os.fstat(file.fileno()).st_ino == own:
                    os.utime(file.fileno())


def read(folder: Path) -> Holder | None:
    """Who has the lease of `folder`, if anybody."""
    try:
        return Holder(**json.loads((folder / FILE).read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise LeaseError(f"{folder / FILE}: cannot be read ({error}). Remove it if no run trains there") from error


def lives(folder: Path, holder: Holder, asking: Holder) -> bool:
    """Whether `holder` may still train in `folder`, for all that `asking` can find out; may take half a minute."""
    if holder.job == asking.job and holder.restart < asking.restart:
        return False  # the scheduler ended it, whatever is left of it
    if holder.place == asking.place:
        try:
            os.kill(holder.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # of another user
        if born := _birth(holder.process):
            return born == holder.started
    seen, looks = _time(folder), 0
    while looks < _SILENT_LOOKS:
        time.sleep(_BEAT_SECONDS)
        try:
            now = _time(folder)
        except OSError:  # the file system has other worries
            continue
        if now != seen:
            return now is not None
        looks += 1
    return False


def _birth(process: int) -> str | None:
    """When a process of this machine started, in terms that a clock that is set does not change; None: not to be
    seen."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # After the name, which is in brackets and may hold anything, the 20th field (proc(5): 22, starttime).
        return f"{boot} {Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return None


def _time(folder: Path) -> int | None:
    try:
        with open(folder / FILE, "rb") as file:  # opened, so that NFS asks its server
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _place() -> str:
    """The same for processes that can see each other."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(namespace) if namespace.exists() else ''}".strip()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks."""
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        with open(folder / LOCK, "a+b") as file:
            # A holder that stands still must not stop those who come after it.
            if _lock(file.fileno(), until=end) and not _is(folder / LOCK, file.fileno()) and time.monotonic() < end:
                continue  # it went with the run that held it
            yield
            return


def _lock(descriptor: int, *, until: float) -> bool:
    """False where there are no locks, or not in time."""
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


def _is(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False
