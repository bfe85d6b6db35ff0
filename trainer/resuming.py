"""Which checkpoint a run goes on from, and whether its settings allow it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from trainer.checkpoint.store import CheckpointError, Store
from trainer.config import RunConfig

# What a checkpoint's state belongs to. The rest may change from one start to the next: where, how fast, how often, and
# what a run is steered with, which `changed` names.
_FIXED = (
    "seed",
    "model.path",
    "model.random",
    "model.dtype",
    "model.quantization",
    "substrate",
    "selector",
    "update",
    "bank",
    "always_on",
    "optimizer.name",
    "train.global_batch_size",
)
# Of what is fixed, where a thing lies and what is done with it in the end.
_FREE = ("model.path", "substrate.merge", "substrate.adapter")

_STEERING = ("optimizer", "schedule", "train")


class FinishedError(CheckpointError):
    """There is nothing left to do: this job, requeued, had come to its end before."""


def finished_by(folder: Path, job: str, config: RunConfig) -> bool:
    """Whether the run in `folder`, with this configuration, came to its end in this job."""
    steps = Store(folder).steps()
    if not steps or not finished(folder):
        return False
    try:
        state = Store(folder).read(steps[0]).state["run"]
        return state.get("job") == job and state["config"] == config.model_dump(mode="json")
    except CheckpointError:
        return False


def finished(folder: Path) -> bool:
    """Whether the run in `folder` came to its end: what it writes last is there."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        adapters = config["substrate"]["name"] == "adapter"
    except (OSError, yaml.YAMLError, TypeError, KeyError):  # what is there is nobody's to go on with
        return True
    return (folder / ("adapter" if adapters else "model")).exists()


def can_go_on(folder: Path) -> bool:
    """Whether `folder` holds a run that saved checkpoints and did not come to its end."""
    return bool(Store(folder).steps()) and not finished(folder)


def named(resume: str) -> tuple[Store, int | None]:
    """The store of `resume: PATH` (a run folder or a checkpoint's .json), and the step that it names, if any."""
    path = Path(resume).expanduser()
    checkpoint = re.fullmatch(r"step-(\d{8})\.json", path.name)
    if checkpoint:
        return Store(path.parent.parent), int(checkpoint[1])
    if path.suffix == ".json":
        raise CheckpointError(
            f"resume: {resume} is no checkpoint; allowed: a run folder, or its checkpoints/step-*.json"
        )
    return Store(path.parent if path.name == "checkpoints" else path), None


def came_from(store: Store, resume: str) -> bool:
    """Whether the newest checkpoint of `store` is of a run that began with this `resume: PATH`."""
    try:
        return bool(store.steps()) and store.read(store.steps()[0]).state["run"]["config"]["resume"] == resume
    except CheckpointError:
        return False


def check_settings(saved: Mapping[str, Any], config: RunConfig) -> None:
    """Raises `CheckpointError` where the run that was saved would not be the one that goes on."""
    different = [
        f"{key}: {before!r} in the checkpoint, {after!r} now"
        for key, before, after in _changes(saved, config, _FIXED)
        if key not in _FREE
    ]
    if different:
        raise CheckpointError(
            "these settings are not those of the run to go on with: "
            + "; ".join(different)
            + ". Take them back, or start anew with resume=never or another output"
        )


def changed(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """A line for each setting that steers training and is another one than in the run that was saved."""
    return [
        f"{key} is {after!r} from here on, after {before!r}"
        for key, before, after in _changes(saved, config, _STEERING)
    ]


def _changes(saved: Mapping[str, Any], config: RunConfig, paths: Iterable[str]) -> Iterator[tuple[str, Any, Any]]:
    now = config.model_dump(mode="json")
    for path in paths:
        yield from _differences(path, _at(saved, path), _at(now, path))


def _differences(path: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in sorted({*before, *after}):
            yield from _differences(f"{path}.{key}", before.get(key), after.get(key))
    elif before != after:
        yield path, before, after


def _at(values: Any, path: str) -> Any:
    for name in path.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values
