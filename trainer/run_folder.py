"""The folder of a run: a fresh one for each, with the resolved configuration in it."""

from __future__ import annotations

import fcntl
import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from deepspeed import comm as dist

from trainer.checkpoint.store import Store
from trainer.config import RunConfig, dump
from trainer.resuming import came_from, can_go_on, named

_OF_A_RUN = ("config.yaml", "metrics.jsonl", "model", "adapter", "importance.png", "tensorboard", "checkpoints")


# Open files whose locks say that a run is alive.
_LOCKED: list[BinaryIO] = []


def _wanted(config: RunConfig) -> Path:
    return Path(config.output).expanduser()


@contextmanager
def start_run_folder(config: RunConfig) -> Iterator[Path]:
    """The run folder, with the resolved configuration in it; a folder that holds a run is never written over, but a run
    that stopped there goes on (`resume`).

    Where what happens inside is refused, what was written goes again, and the folder with it if nothing else is there:
    it may be one of the user's.
    """
    if config.resume not in ("auto", "never"):
        named(config.resume)  # refused on all ranks alike
    chosen: list[Any] = [None]
    goes_on = False  # of rank 0, who alone takes back what it wrote
    if dist.get_rank() == 0:
        there = _to_go_on_in(config)
        chosen, goes_on = [there or _reserve(config)], there is not None
    torch.distributed.broadcast_object_list(chosen)
    folder = Path(chosen[0])
    try:
        yield folder
    except BaseException:
        if dist.get_rank() == 0 and not goes_on:
            (folder / "config.yaml").unlink(missing_ok=True)
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            with suppress(OSError):
                folder.rmdir()
        raise


def _to_go_on_in(config: RunConfig) -> Path | None:
    """The folder of the run that `resume` goes on with, if that is one of `output`'s."""
    if config.resume == "never":
        return None
    source = None if config.resume == "auto" else named(config.resume)[0].folder.resolve()
    for folder in takewhile(_holds_a_run, _numbered(config)):
        store = Store(folder)
        ours = source is None or store.folder.resolve() == source or came_from(store, config.resume)
        if ours and (can_go_on(folder) or store.folder.resolve() == source) and _lock(folder):
            return folder
    return None


def _lock(folder: Path) -> bool:
    """Keep other processes from going on in `folder` as well, until this one ends; False where one does already."""
    file = open(folder / "config.yaml", "rb")  # noqa: SIM115 - held until the process ends
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    except OSError:  # a file system without locks
        pass
    _LOCKED.append(file)
    return True


def _holds_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in _OF_A_RUN)


def _numbered(config: RunConfig) -> Iterator[Path]:
    """RUN, RUN-2, RUN-3, ...: the same name is given to one run after another."""
    wanted = _wanted(config)
    yield wanted
    for number in itertools.count(2):
        # A name of its own also for "." and "..".
        yield wanted.resolve().with_name(f"{wanted.resolve().name}-{number}")


def _reserve(config: RunConfig) -> Path:
    for folder in _numbered(config):
        if _holds_a_run(folder):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(folder / "config.yaml", "x", encoding="utf-8") as file:  # or another job was faster
                file.write(dump(config))
            _lock(folder)
            return folder
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def move_tensorboard(ds: dict[str, Any], config: RunConfig, folder: Path) -> None:
    """Into the run folder, which is not `output` where that holds an earlier run; a path in the JSON stands."""
    if config.monitor.tensorboard and ds["tensorboard"]["output_path"] == str(_wanted(config) / "tensorboard"):
        ds["tensorboard"]["output_path"] = str(folder / "tensorboard")
