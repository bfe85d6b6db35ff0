"""The folder of a run: a fresh one for each, with the resolved configuration in it, and one run at a time."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from trainer.checkpoint import disk
from trainer.checkpoint.agreement import told_by_rank_0
from trainer.checkpoint.lease import FILE as LEASE
from trainer.checkpoint.lease import Holder, Lease, lives, this_process
from trainer.checkpoint.lease import read as read_lease
from trainer.checkpoint.store import Store
from trainer.config import RunConfig, dump
from trainer.resuming import FinishedError, came_from, can_go_on, finished, finished_by, named

_OF_TRAINING = ("metrics.jsonl", "model", "adapter", "importance.png", "checkpoints")
_OF_A_RUN = ("config.yaml", *_OF_TRAINING, "tensorboard", LEASE)


def _wanted(config: RunConfig) -> Path:
    return Path(config.output).expanduser()


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes, on all ranks, and on rank 0 the lease of it."""

    path: Path
    lease: Lease | None

    def publishing(self) -> AbstractContextManager[None]:
        """On rank 0: inside it the folder is this run's alone; raises `LeaseError` where it is not any more."""
        return nullcontext() if self.lease is None else self.lease.held()

    def check_lease(self) -> None:
        """Raise `LeaseError` on all ranks where another job has taken the folder over. Collective."""
        told_by_rank_0(lambda: self.lease.check() if self.lease is not None else None)


@contextmanager
def start_run_folder(config: RunConfig) -> Iterator[RunFolder]:
    """The run folder, with the resolved configuration in it, for this run alone as long as the context lasts.

    A folder that holds a run is never written over, but a run that stopped there goes on (`resume`). Raises
    `CheckpointError` on all ranks where another job trains there.

    Where what happens inside is refused before training, what was written goes again, and the folder with it if nothing
    else is there: it may be one of the user's.
    """
    if config.resume not in ("auto", "never"):
        named(config.resume)  # refused on all ranks alike
    lease: Lease | None = None

    def choose() -> str:
        nonlocal lease
        lease = _choose(config)
        return str(lease.folder)

    folder = Path(told_by_rank_0(choose))
    try:
        yield RunFolder(folder, lease)
    finally:
        # What another job has taken over is no more this one's to tidy up.
        if lease is not None and lease.release():
            if not any((folder / name).exists() for name in _OF_TRAINING):
                _take_back(folder)


def _take_back(folder: Path) -> None:
    (folder / "config.yaml").unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()


def _choose(config: RunConfig) -> Lease:
    """The lease of the folder to train in."""
    holder = this_process()
    while True:
        folder = _to_go_on_in(config, holder)
        if folder is not None:
            lease = Lease.take(folder, holder)
            disk.publish(folder / "config.yaml", dump(config).encode())  # as it goes on
            return lease
        folder = _reserve(config)
        if folder is not None:
            return Lease.take(folder, holder)


def _to_go_on_in(config: RunConfig, holder: Holder) -> Path | None:
    """The folder of the run that `resume` goes on with, if that is one of `output`'s."""
    if config.resume == "never":
        return None
    source = None if config.resume == "auto" else named(config.resume)[0].folder.resolve()
    for folder in takewhile(_holds_a_run, _numbered(config)):
        store = Store(folder)
        ours = source is None or store.folder.resolve() == source or came_from(store, config.resume)
        if ours and can_go_on(folder):
            return folder
        if holder.restart and finished_by(folder, holder.job, config):
            raise FinishedError(f"{holder.job} had finished the run in {folder} before it was requeued")
        # Of this job before it was requeued, without a checkpoint yet; or of one that trains there now, which is named
        # when its lease is wanted.
        before = read_lease(folder)
        if before is not None and not finished(folder) and (before.job == holder.job or lives(folder, before, holder)):
            return folder
    return None


def _holds_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in _OF_A_RUN)


def _numbered(config: RunConfig) -> Iterator[Path]:
    """RUN, RUN-2, RUN-3, ...: the same name is given to one run after another."""
    wanted = _wanted(config)
    yield wanted
    for number in itertools.count(2):
        # A name of its own also for "." and "..".
        yield wanted.resolve().with_name(f"{wanted.resolve().name}-{number}")


def _reserve(config: RunConfig) -> Path | None:
    """A fresh folder with the configuration in it; None where another job was faster."""
    folder = next(folder for folder in _numbered(config) if not _holds_a_run(folder))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / "config.yaml", "x", encoding="utf-8") as file:
            file.write(dump(config))
    except FileExistsError:
        return None
    return folder


def move_tensorboard(ds: dict[str, Any], config: RunConfig, folder: Path) -> None:
    """Into the run folder, which is not `output` where that holds an earlier run; a path in the JSON stands."""
    if config.monitor.tensorboard and ds["tensorboard"]["output_path"] == str(_wanted(config) / "tensorboard"):
        ds["tensorboard"]["output_path"] = str(folder / "tensorboard")
