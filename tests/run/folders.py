"""Make run folders in the states that a run can leave, and take them as a start does."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trainer.checkpoint.store import Manifest, Store
from trainer.config import RunConfig, dump, load
from trainer.run.folder import RunFolder, take_folder

SAME = ("method=lisa", "train.steps=6", "train.global_batch_size=1", "data.train=x.jsonl", "model.path=/x")


STEPS = 6


MANIFEST = "checkpoints/step-00000003.json"


def configure(output: Path, *more: str) -> RunConfig:
    return load(None, [*SAME, f"output={output}", *more], check_files=False)


def contents(folder: Path) -> set[str]:
    return {str(entry.relative_to(folder)) for entry in folder.rglob("*")}


def state_of(config: RunConfig, **changes: Any) -> dict[str, Any]:
    """What a run records in a checkpoint."""
    state = {"job": "process 1 on here", "config": config.model_dump(mode="json"), "data": {"data": "abc"}}
    state |= {"scheduler": {}, "evaluations": [], "skipped": 0, "last_loss": 0.5, "meter": [0.0, 0.0]}
    return state | changes


def save(folder: Path, state: Mapping[str, Any], step: int = 3) -> None:
    store = Store(folder)
    (store.folder / "pool").mkdir(parents=True, exist_ok=True)
    store.publish(Manifest(step, {}, {"ranks": 1, "best": None, "run": dict(state)}))


def begun(folder: Path, *more: str) -> None:
    """Killed before the first checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(configure(folder, *more)))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')


def stopped(folder: Path, *more: str) -> None:
    """Killed after a checkpoint."""
    begun(folder, *more)
    save(folder, state_of(configure(folder, *more)))


def finished(folder: Path, *more: str) -> None:
    """To its end; with `more` of an adapter run, the adapter."""
    stopped(folder, *more)
    save(folder, state_of(configure(folder, *more)), STEPS)
    write_model(folder, adapter=configure(folder, *more).substrate.name == "adapter")


def write_model(folder: Path, *, adapter: bool = False) -> None:
    """What a run writes last, of a single weight."""
    stem, config = ("adapter_model", "adapter_config.json") if adapter else ("model", "config.json")
    model = folder / ("adapter" if adapter else "model")
    model.mkdir(parents=True)
    (model / config).write_text("{}")
    save_file({"weight": torch.ones(3)}, model / f"{stem}.safetensors")


def take(config: RunConfig, *data: str) -> RunFolder:
    """The folder that a start would get; the lease is given back."""
    with ExitStack() as leaving:
        return take_folder(config, data, leaving)[0]


def said(workspace: RunFolder) -> str:
    return "\n".join(workspace.remarks)
