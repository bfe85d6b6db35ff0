"""The folder of a run: a fresh one for each, with the resolved configuration in it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist

from trainer.config import RunConfig, dump

_OF_A_RUN = ("config.yaml", "metrics.jsonl", "model", "adapter", "importance.png", "tensorboard", "checkpoints")


def _wanted(config: RunConfig) -> Path:
    return Path(config.output).expanduser()


@contextmanager
def start_run_folder(config: RunConfig) -> Iterator[Path]:
    """The run folder, with the resolved configuration in it; a folder that holds a run is never written over.

    Where what happens inside is refused, what was written goes again, and the folder with it if nothing else is there:
    it may be one of the user's.
    """
    chosen: list[Any] = [_reserve(config) if dist.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(chosen)
    folder = Path(chosen[0])
    try:
        yield folder
    except BaseException:
        if dist.get_rank() == 0:
            (folder / "config.yaml").unlink(missing_ok=True)
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            with suppress(OSError):
                folder.rmdir()
        raise


def _reserve(config: RunConfig) -> Path:
    wanted = _wanted(config)
    for number in itertools.count(1):
        # A name of its own also for "." and "..".
        folder = wanted if number == 1 else wanted.resolve().with_name(f"{wanted.resolve().name}-{number}")
        if any((folder / name).exists() for name in _OF_A_RUN):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(folder / "config.yaml", "x", encoding="utf-8") as file:  # or another job was faster
                file.write(dump(config))
            return folder
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def move_tensorboard(ds: dict[str, Any], config: RunConfig, folder: Path) -> None:
    """Into the run folder, which is not `output` where that holds an earlier run; a path in the JSON stands."""
    if config.monitor.tensorboard and ds["tensorboard"]["output_path"] == str(_wanted(config) / "tensorboard"):
        ds["tensorboard"]["output_path"] = str(folder / "tensorboard")
