"""Name the rank that died: launchers only say that some process ended, collectives that a connection was lost."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepspeed import comm as dist
from torch import distributed

_LAST_WORD_SECONDS = 1.0


@contextmanager
def watch_ranks() -> Iterator[None]:
    """While inside, the ranks of a machine watch each other's processes and name the first that ends, on stderr.

    Collective. Does nothing where the system has no `pidfd_open` (Linux has had it since 5.3).
    """
    processes = _processes_here()
    opened = {rank: _open(pid) for rank, pid in processes.items() if pid != os.getpid()}
    others = {descriptor: rank for rank, descriptor in opened.items() if descriptor is not None}
    leaving, leave = os.pipe()
    watcher = threading.Thread(target=_watch, args=(others, processes, leaving), name="rank watch", daemon=True)
    watcher.start()
    try:
        yield
        dist.barrier()  # who finishes first must not be taken for dead
    except BaseException:
        watcher.join(_LAST_WORD_SECONDS)  # what failed here may be that another rank has died
        raise
    finally:
        os.close(leave)  # wakes the watcher
        watcher.join()
        for descriptor in (leaving, *others):
            os.close(descriptor)


def _processes_here() -> dict[int, int]:
    """Process ids of the ranks whose processes can be seen from here, by rank."""
    namespace = Path("/proc/self/ns/pid")
    here = (socket.gethostname(), os.readlink(namespace) if namespace.exists() else "")
    everyone: list[object] = [None] * dist.get_world_size()
    distributed.all_gather_object(everyone, (here, os.getpid()))
    return {rank: pid for rank, (place, pid) in enumerate(everyone) if place == here}  # type: ignore[misc]


def _open(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _watch(others: dict[int, int], processes: dict[int, int], leaving: int) -> None:
    """Stops at the first end of a process: the launcher stops the others one by one, and they must not be named."""
    ready, _, _ = select.select([*others, leaving], [], [])
    if leaving in ready:
        return
    gone = sorted(others[descriptor] for descriptor in ready)
    if dist.get_rank() == min(rank for rank in processes if rank not in gone):
        named = ", ".join(f"rank {rank} (process {processes[rank]})" for rank in gone)
        print(
            f"\n{named} ended before the run did, and the other ranks cannot go on without it. If it left no message "
            "of its own, it was killed, for instance for want of memory",
            file=sys.stderr,
            flush=True,
        )
