"""Read from /proc which processes started this rank, and which ranks run beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from trainer.cluster.ranks import in_step

# Variables that launchers set for the ranks they start (torchrun, DeepSpeed's, mpirun), and names of launchers.
_LAUNCHED = ("TORCHELASTIC_RUN_ID", "CROSS_RANK", "OMPI_COMM_WORLD_RANK")
_LAUNCHERS = ("torchrun", "torch.distributed", "deepspeed", "accelerate", "slurmstepd", "mpi", "orted", "prted")
_RUNNERS = ("deepspeed", "ds", "deepspeed.launcher.runner")


def children(parent: int) -> list[int]:
    """Return the processes that `parent` has started and that have not ended; none if that cannot be seen."""
    found: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{parent}/task").iterdir():
            with suppress(OSError):
                found += map(int, (thread / "children").read_text().split())
    return found


def variables_of(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with; empty if it cannot be read."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.partition("=")[::2] for entry in entries)


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _status(pid: int) -> tuple[str, int, int] | None:
    """Return the state of a process, its parent and its process group; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1]), int(fields[2])


def launchers(environment: Mapping[str, str]) -> list[int | None]:
    """Return the processes that started this rank and wait for it; None for one that has ended already.

    A rank that was started by hand has none: its shell may end on purpose (nohup).
    """
    if "RANK" not in environment or not (in_step(environment) or any(name in environment for name in _LAUNCHED)):
        return []
    parent = os.getppid()
    if parent == 1 and not any(name in word for word in _words(1) for name in _LAUNCHERS):
        return [None]
    found: list[int | None] = [parent] if parent else []  # 0: outside this container
    status = _status(parent)
    if "CROSS_RANK" in environment and status is not None:  # `deepspeed` started this rank's parent
        above, leader = status[1], _status(status[2])
        if any(Path(word).name in _RUNNERS for word in _words(above)):
            found.append(above)
        elif above == 1 and (leader is None or leader[0] == "Z"):
            found.append(None)  # `deepspeed`, the leader of the process group, has ended
    return found
