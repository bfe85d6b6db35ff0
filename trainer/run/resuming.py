"""Read what a run recorded, find the checkpoint from which it resumes, and compare its settings with present ones."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.checkpoint.checks import readable
from trainer.checkpoint.store import CheckpointError, Manifest, Store
from trainer.config import RunConfig

# Settings on which a checkpoint's state depends. All others may change from one start to the next; `changed` names
# those that steer training.
_FIXED = (
    "seed",
    "model.path",
    "model.random",
    "model.add_tokens",
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
# Exceptions from the above: paths, and what is written at the end of the run.
_FREE = ("model.path", "substrate.merge", "substrate.adapter")

_STEERING = ("optimizer", "schedule", "train", "model.attention")

# Settings that do not make it another run.
_BESIDE = ("output", "resume", "checkpoint", "data.cache", "train.timeout_minutes")


# A key, its recorded value, and its present value.
Difference = tuple[str, Any, Any]


class FinishedError(CheckpointError):
    """Raised if there is nothing left to do: the run in `folder` is finished."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message, folder)  # both, so that ranks can send it to each other
        self.folder = folder

    def __str__(self) -> str:
        return self.args[0]


class OtherLoopError(CheckpointError):
    """Raised for a whole checkpoint of a training loop other than `trainer.train`."""


class RunState(BaseModel):
    """The record of a run in a checkpoint, beside the state of the engine."""

    model_config = ConfigDict(strict=True)

    job: str | None = None  # as the lease names it
    config: dict[str, Any]
    data: dict[str, Any]
    scheduler: dict[str, Any]
    evaluations: list[tuple[int, float | None]]
    skipped: int
    last_loss: float | None
    meter: tuple[float | None, float | None]


@dataclass(frozen=True)
class Origin:
    """The checkpoint from which a run resumes: that of step `step` in `store`, or its newest."""

    store: Store
    step: int | None = None

    def find(self, config: RunConfig) -> tuple[int, RunState]:
        """Read the step and what was recorded there. Raises `CheckpointError` if there is no checkpoint, or if it
        belongs to a run with other settings."""
        step = self.step
        if step is None:
            steps = self.store.steps()
            if not steps:
                raise CheckpointError(_no_checkpoint(self.store.folder))
            step = steps[0]
        state = run_state(self.store, readable(self.store, step))
        check_settings(self.store.folder.parent, state.config, config)
        return step, state


def run_state(store: Store, manifest: Manifest) -> RunState:
    """Read the record of a run of `trainer.train` in a checkpoint. Raises `OtherLoopError` if another loop saved it."""
    recorded = manifest.state.get("run")
    wanted = {name for name, field in RunState.model_fields.items() if field.is_required()}
    where = f"{store.folder}/step-{manifest.step:08d}.json"
    if not isinstance(recorded, Mapping) or not wanted <= recorded.keys():
        folder = store.folder.parent
        raise OtherLoopError(
            f"resume: {where} was saved by another training loop (engine.save_checkpoint, transformers.Trainer or "
            "trainer.checkpoint.Checkpoints) and does not say how far the data and the schedule were. Resume it in "
            f"that loop; or export its model (python -m trainer export {folder} OUT --base MODEL) and begin a run with "
            "model.path=OUT"
        )
    try:
        return RunState.model_validate_json(json.dumps(recorded))
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{where}: run.{'.'.join(map(str, first['loc']))} cannot be used: {first['msg']}"
        ) from error


def named(resume: str) -> Origin:
    """Return the origin that `resume: PATH` names, a run folder or a checkpoint's .json."""
    path = Path(resume).expanduser()
    checkpoint = re.fullmatch(r"step-(\d{8})\.json", path.name)
    if checkpoint:
        return Origin(Store(path.parent.parent), int(checkpoint[1]))
    if path.suffix == ".json":
        raise CheckpointError(
            f"resume: {resume} is no checkpoint; allowed: a run folder, or its checkpoints/step-*.json"
        )
    return Origin(Store(path.parent if path.name == "checkpoints" else path))


def _no_checkpoint(folder: Path) -> str:
    run = folder.parent
    if not run.is_dir():
        return f"resume: no such folder: {run}; name a run folder, or its checkpoints/step-*.json"
    message = f"resume: no checkpoint in {folder}; name a run folder that has some"
    # The names that DeepSpeed's engine and transformers give to folders of checkpoints.
    below = sorted(p.name for p in run.iterdir() if p.is_dir() and re.match(r"global_step|checkpoint-", p.name))
    if (run / "latest").is_file() or below:
        message += (
            f". {run} has checkpoints of engine.save_checkpoint or transformers.Trainer ({', '.join(below[:3])}): only "
            "the loop that saved them can resume from them"
        )
    return message


def check_settings(folder: Path, saved: Mapping[str, Any], config: RunConfig) -> None:
    """Raise `CheckpointError` if the run that was saved in `folder` is not the one that `config` describes."""
    different = [
        f"{key}: {before!r} in the checkpoint, {after!r} now"
        for key, before, after in _fixed(differences(saved, config))
    ]
    if different:
        raise CheckpointError(
            f"these settings are not those of the run to resume, in {folder}: {'; '.join(different)}. Change "
            "them back, or train anew with resume=never or another output"
        )


def changed(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Return a line for each setting that steers training and differs from that of the saved run."""
    return [
        f"{key} is {after!r} from here on, after {before!r}"
        for key, before, after in differences(saved, config)
        if _is_in(key, _STEERING) and key not in _FIXED
    ]


def changed_data(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Return a line for each setting of data and tokenizer that differs from that of the saved run."""
    return [
        f"{key}: {before!r} in the checkpoint, {after!r} now"
        for key, before, after in differences(saved, config)
        if _is_in(key, ("data", "model.tokenizer", "seed"))
    ]


def can_resume(different: list[Difference]) -> bool:
    """Return whether a run may resume with settings that differ in these."""
    return not list(_fixed(different)) and not any(_is_in(key, ("data", "model.tokenizer")) for key, _, _ in different)


def of_another_run(saved: Mapping[str, Any], config: RunConfig) -> list[Difference]:
    """Return the differences that make `config` another run than the recorded one."""
    return [found for found in differences(saved, config) if not _is_in(found[0], _BESIDE)]


def _fixed(different: Iterable[Difference]) -> Iterator[Difference]:
    return ((key, *values) for key, *values in different if _is_in(key, _FIXED) and not _is_in(key, _FREE))


def _is_in(key: str, sections: Collection[str]) -> bool:
    return any(key == section or key.startswith((f"{section}.", f"{section}[")) for section in sections)


def differences(saved: Any, section: BaseModel, path: str = "") -> Iterator[Difference]:
    """Yield each key whose value in `saved` (JSON of a configuration) is not that of `section`, with both values.

    A key that `saved` lacks is no difference: a later version introduced it.
    """
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        key = field.alias or name
        if key in saved and key in values:
            here = f"{path}.{key}" if path else key
            yield from _in_value(here, saved[key], getattr(section, name), values[key])


def _in_value(path: str, before: Any, model: Any, after: Any) -> Iterator[Difference]:
    if isinstance(model, BaseModel) and isinstance(before, Mapping):
        yield from differences(before, model, path)
    elif isinstance(model, tuple) and isinstance(before, list) and len(before) == len(model):
        for index, parts in enumerate(zip(before, model, after, strict=True)):
            yield from _in_value(f"{path}[{index}]", *parts)
    elif isinstance(before, Mapping) and isinstance(after, Mapping):
        # Keys that the user chose, such as those of model.random: there a missing one is a difference.
        for key in sorted({*before, *after}, key=str):
            yield from _in_value(f"{path}.{key}", before.get(key), None, after.get(key))
    elif before != after:
        yield path, before, after
