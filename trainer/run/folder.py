"""Choose the folder of a run and the checkpoint from which it resumes there. Only one run at a time writes to it.

The same command in the same place uses the same folder. What is in `output` decides what a command does:

    what is there                         same settings            other settings
    no run                                starts a run             starts a run
    settings, no checkpoint yet           starts the run again     another folder, and says so
    checkpoints, no model yet             resumes                  resumes if all changes are allowed, else refused
    a model: the run is finished          exit code 0, says so     another folder, and names `resume=` to resume from it
    a model, truncated or emptied         refused, names the file  another folder
    settings that cannot be read          another folder, and says so; refused if there are checkpoints

"Another folder" is the first of OUTPUT-2, OUTPUT-3, ... for which the table does not say "another folder" again.
`resume: never` chooses the first that contains no run. `resume: PATH` chooses the first that is PATH itself, contains
no run, or contains a run started with the same `resume`. A job that its scheduler has requeued always finds its own
folder.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import Path
from typing import Any

from trainer.checkpoint import disk
from trainer.checkpoint.agreement import ask_rank_0
from trainer.checkpoint.lease import FILE as LEASE
from trainer.checkpoint.lease import LOCK, Holder, Lease, LeaseError, lives, refuse_taken, this_process
from trainer.checkpoint.lease import read as read_lease
from trainer.checkpoint.store import CheckpointError, Store
from trainer.config import ConfigError, RunConfig, dump
from trainer.config.files import read_yaml
from trainer.export import unfinished
from trainer.export.shards import damage_of
from trainer.run.rank_watch import RankWatch
from trainer.run.resuming import (
    Difference,
    FinishedError,
    Origin,
    OtherLoopError,
    RunState,
    can_resume,
    named,
    of_another_run,
    run_state,
)

SETTINGS = "config.yaml"
_WRITTEN_LAST = ("model", "adapter")
_TRAINING_ENTRIES = ("metrics.jsonl", *_WRITTEN_LAST, "importance.png", "checkpoints")
_RUN_ENTRIES = (SETTINGS, *_TRAINING_ENTRIES, "tensorboard")
# How many settings a remark lists at most, and how many remarks are printed at most.
_MAX_SETTINGS, _MAX_REMARKS = 4, 3


@dataclass(frozen=True)
class RunFolder:
    """The folder to which a run writes, known on all ranks, and its lease, on rank 0."""

    path: Path
    origin: Origin | None  # the checkpoint from which it resumes; None: it starts anew
    remarks: tuple[str, ...]  # to print, about this folder and those that were not chosen
    lease: Lease | None = None

    def publishing(self) -> AbstractContextManager[None]:
        """Reserve the folder for this run on rank 0 within a `with` block; raises `LeaseError` if another has it."""
        return nullcontext() if self.lease is None else self.lease.held()

    def check_lease(self) -> None:
        """Raise `LeaseError` on all ranks if another job has taken over the folder. Collective."""
        ask_rank_0(lambda: self.lease.check() if self.lease is not None else None)

    def record(self, config: RunConfig) -> None:
        """Record the settings with which the run resumes, after all checks have accepted them. Collective."""
        ask_rank_0(lambda: _write_settings(self.lease, config) if self.lease is not None else None)


@contextmanager
def start_run_folder(
    config: RunConfig, data: Collection[str] = (), watch: RankWatch | None = None
) -> Iterator[RunFolder]:
    """Reserve a folder for this run within a `with` block, and write the resolved configuration there. `data` contains
    the fingerprint of the training data, and the one that earlier versions computed. `watch` releases the folder if it
    has to end this process.

    Raises `CheckpointError` on all ranks: `FinishedError` if there is nothing left to do, `LeaseError` if another job
    trains in the folder.

    If the run is refused before training, what it wrote is removed again. So is the folder if it is then empty: other
    files in it may be the user's.
    """
    with ExitStack() as cleanup:
        # A main thread that waits in a collective when the run ends cannot clean up.
        if watch is not None:
            watch.before_leaving(cleanup.close)
        lease: Lease | None = None

        def choose() -> RunFolder:
            nonlocal lease  # kept on rank 0: what is returned is sent to all ranks
            chosen, lease = take_folder(config, data, cleanup)
            return chosen

        chosen: RunFolder = ask_rank_0(choose)
        yield replace(chosen, lease=lease)


def take_folder(config: RunConfig, data: Collection[str], cleanup: ExitStack) -> tuple[RunFolder, Lease]:
    """Decide on rank 0 where to train, and acquire the lease of that folder until `cleanup` is closed. Raises what
    `start_run_folder` raises."""
    holder = this_process()
    while True:
        try:
            before, chosen = _choose_folder(config, data, holder)
        except FinishedError as finished:
            _clear_up(finished.folder, holder)
            raise
        chosen.path.mkdir(parents=True, exist_ok=True)
        lease = Lease(chosen.path, holder)
        cleanup.callback(_leave, lease)  # registered before `take`: a signal may raise an exception at any moment
        lease.take()
        if _inspect(chosen.path).state is not before.state:  # another job has used it meanwhile: choose again
            lease.release()
            continue
        if chosen.origin is not None:
            chosen.origin.find(config)  # raises if the settings do not fit, before a model is built
        with lease.held():
            _tidy(chosen.path)
        if before.state is not State.STOPPED:
            _write_settings(lease, config)
        return chosen, lease


def would_resume(config: RunConfig, data: Collection[str]) -> RunState | None:
    """Return the record of the run that a run with `config` would resume now, or None if it would start anew.

    Raises what `start_run_folder` raises, but writes nothing and does not communicate with other ranks.
    """
    holder = this_process()
    _, chosen = _choose_folder(config, data, holder)
    refuse_taken(chosen.path, holder)
    return None if chosen.origin is None else chosen.origin.find(config)[1]


def _leave(lease: Lease) -> None:
    """Release the folder, and remove what the run wrote there if it never trained. A folder that another job
    has taken over is not changed."""
    folder = lease.folder
    with suppress(LeaseError, OSError), lease.held():
        if not any(os.path.lexists(folder / name) for name in _TRAINING_ENTRIES):
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            disk.remove(folder / SETTINGS)
            _tidy(folder)
    if lease.release():
        with suppress(OSError):
            folder.rmdir()  # fails if it is not empty


def _write_settings(lease: Lease, config: RunConfig) -> None:
    with lease.held():
        disk.publish(lease.folder / SETTINGS, dump(config).encode())


def _tidy(folder: Path) -> None:
    """Remove files that an earlier attempt had not finished writing when it was killed."""
    disk.remove_partials(folder, "|".join(map(re.escape, (SETTINGS, LEASE, "metrics.jsonl", "importance.png"))))
    disk.remove_partials(Store(folder).folder, r"step-\d{8}\.json")


# --- what a folder contains --------------------------------------------------------------------------------------


class State(Enum):
    """The progress of the run in a folder."""

    FREE = auto()  # no run
    BEGUN = auto()  # settings, but no checkpoint
    STOPPED = auto()  # checkpoints, but no model
    FINISHED = auto()  # a model
    UNKNOWN = auto()  # a run whose settings cannot be read


@dataclass(frozen=True)
class _Contents:
    """The content of a folder. `settings` are all readable records of the run's settings, the most trusted first."""

    folder: Path
    state: State
    settings: tuple[dict[str, Any], ...] = ()
    saved: RunState | None = None
    problem: str = ""  # why settings cannot be read
    has_checkpoints: bool = False

    def differences(self, config: RunConfig, data: Collection[str]) -> list[Difference]:
        """Return how the run there differs from `config`. Of its recorded settings, those that differ least count."""
        different = min((of_another_run(values, config) for values in self.settings), key=len, default=[])
        before = None if self.saved is None else self.saved.data.get("data")
        if isinstance(before, str) and data and before not in data:
            different = [*different, ("data.train (its samples)", before[:12], next(iter(data))[:12])]
        return different

    @property
    def began_with(self) -> Any:
        """Return the value of `resume` with which the run was started."""
        return self.settings[0].get("resume") if self.settings else None


def _inspect(folder: Path) -> _Contents:
    if not any(os.path.lexists(folder / name) for name in _RUN_ENTRIES):
        return _Contents(folder, State.FREE)
    store = Store(folder)
    steps = store.steps()
    saved, other_loop, problem = None, False, ""
    for step in steps:
        try:
            saved = run_state(store, store.read(step))
            break
        except OtherLoopError as error:
            other_loop, problem = True, problem or str(error)
        except CheckpointError as error:
            problem = problem or str(error)
    written, why = _read_settings(folder)
    settings = [values for values in (saved and saved.config, written) if values and _names_substrate(values)]
    if not settings:
        why = f"{why}; {problem}" if problem else why
        return _Contents(folder, State.UNKNOWN, problem=why, has_checkpoints=bool(steps) and not other_loop)
    if all(path.exists() for path in _written_last(folder, settings[0])):
        state = State.FINISHED
    else:
        state = State.STOPPED if steps else State.BEGUN
    return _Contents(folder, state, tuple(settings), saved, why, bool(steps))


def _written_last(folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """Return the models that a run with `settings` writes last, whether or not they exist yet."""
    substrate = settings["substrate"]
    last = ["adapter"] * (substrate["name"] == "adapter") + ["model"] * (substrate.get("merge") is True)
    return [folder / name for name in last or ["model"]]


def _read_settings(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the settings that a run recorded, or None and why they cannot be read."""
    file = folder / SETTINGS
    if not os.path.lexists(file):
        return None, f"there is no {file}"
    try:
        values = read_yaml(str(file))
    except ConfigError as error:
        return None, "; ".join(error.problems)
    if not _names_substrate(values):
        return None, f"{file} is empty" if not values else f"{file} is not of a run"
    return values, ""


def _names_substrate(values: dict[str, Any]) -> bool:
    """Return whether `values` look like the settings of a run, whose substrate other functions read."""
    return isinstance(values.get("substrate"), dict) and "name" in values["substrate"]


# --- where to train ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Accepted:
    """The run trains in this folder. It resumes from `origin`, or starts anew if that is None."""

    origin: Origin | None
    remark: str = ""


def _choose_folder(config: RunConfig, data: Collection[str], holder: Holder) -> tuple[_Contents, RunFolder]:
    """Try OUTPUT, OUTPUT-2, ... by the table above. Raises `FinishedError`, or `CheckpointError` if a run is
    refused."""
    reasons: list[str] = []
    for folder in _numbered(config):
        found = _inspect(folder)
        verdict = _judge(found, config, data, holder)
        if isinstance(verdict, _Accepted):
            does = "starts anew" if verdict.origin is None else "resumes"
            remarks = [f"{reason}; this run {does} in {folder}" for reason in reasons[-_MAX_REMARKS:]]
            return found, RunFolder(folder, verdict.origin, (*remarks, *filter(None, [verdict.remark])))
        reasons += filter(None, [verdict])
    raise AssertionError("there is always a further folder")


def _judge(found: _Contents, config: RunConfig, data: Collection[str], holder: Holder) -> _Accepted | str:
    """Return `_Accepted` if the run trains in this folder, else a remark that says why not, or "" if none is needed."""
    folder, resume = found.folder, config.resume
    origin = named(resume) if resume not in ("auto", "never") else None
    if found.state is State.FREE:
        return _Accepted(origin)
    requeued = _is_same_job(found, holder)
    if resume == "never" and not requeued:
        return ""
    same_start = origin is None or found.began_with == resume
    different = found.differences(config, data)
    if found.state is State.FINISHED:
        if same_start and not different:
            for model in _written_last(folder, found.settings[0]):
                if problem := damage_of(model, adapter=model.name == "adapter"):
                    then = "resumes from the newest checkpoint" if found.has_checkpoints else "starts anew"
                    raise CheckpointError(f"{problem}. Remove {model}, and the same command {then}")
            raise FinishedError(_finished_message(found), folder)
        return "" if origin is not None else _other_finished_message(found, different)
    lease = read_lease(folder)
    if lease is not None and lives(folder, lease, holder):
        return _Accepted(None)  # then `take` refuses, and its message names the job that has the lease
    if found.state is State.UNKNOWN:
        if found.has_checkpoints and origin is None:
            raise CheckpointError(
                f"output: {folder} has checkpoints, but the settings of their run cannot be read: {found.problem}. "
                f"Restore {SETTINGS}, or set another output or resume=never"
            )
        return f"{folder} contains no readable run ({found.problem}) and is not changed"
    if found.state is State.BEGUN:
        if same_start and (requeued or not different):
            return _Accepted(origin)
        return (
            f"{folder} contains a run with other settings ({_listed(different)}) and no checkpoint" if different else ""
        )
    recovered = f"{found.problem}: its settings are those of its newest checkpoint" if found.problem else ""
    own = Origin(Store(folder))
    if same_start:
        return _Accepted(own, recovered)
    if origin is not None and origin.store.folder.resolve() == own.store.folder.resolve():
        return _Accepted(origin, recovered)
    return ""


def _numbered(config: RunConfig) -> Iterator[Path]:
    """Yield OUTPUT, OUTPUT-2, OUTPUT-3, ..."""
    output = _output(config)
    yield output
    for number in itertools.count(2):
        # Resolved, because a number cannot be added to "." and "..".
        yield output.resolve().with_name(f"{output.resolve().name}-{number}")


def _output(config: RunConfig) -> Path:
    return Path(config.output).expanduser()


def _is_same_job(found: _Contents, holder: Holder) -> bool:
    """Return whether an earlier attempt of the same job trained there."""
    if not holder.restart:
        return False
    if found.saved is not None and found.saved.job == holder.job:
        return True
    try:
        before = read_lease(found.folder)
    except LeaseError:
        return False
    return before is not None and before.job == holder.job


def _clear_up(folder: Path, holder: Holder) -> None:
    """Remove what is left of a run that was killed after its model was written."""
    with suppress(LeaseError, OSError):
        if any(os.path.lexists(folder / name) for name in (LEASE, LOCK)):
            Lease(folder, holder).take().release()
        _tidy(folder)
        for name in _WRITTEN_LAST:
            unfinished.clear_up(folder / name)


def _finished_message(found: _Contents) -> str:
    model = next(name for name in ("adapter", "model") if (found.folder / name).exists())
    message = (
        f"The run in {found.folder} is finished, and there is nothing left to do: see {found.folder / model}. To start "
        "anew, set resume=never or another output"
    )
    return f"{message}. {found.problem}" if found.problem else message


def _other_finished_message(found: _Contents, different: list[Difference]) -> str:
    message = f"{found.folder} contains a finished run with other settings ({_listed(different)})"
    if found.has_checkpoints and can_resume(different):
        message += f"; resume={found.folder} resumes from it"
    return message


def _listed(different: list[Difference]) -> str:
    shown = [f"{key}: {_short(before)} there, {_short(after)} now" for key, before, after in different[:_MAX_SETTINGS]]
    more = len(different) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def move_tensorboard(ds: dict[str, Any], config: RunConfig, folder: Path) -> None:
    """Let TensorBoard write to the run folder, which may be OUTPUT-2 instead of OUTPUT. A path that the DeepSpeed
    JSON sets is kept."""
    if config.monitor.tensorboard and ds["tensorboard"]["output_path"] == str(_output(config) / "tensorboard"):
        ds["tensorboard"]["output_path"] = str(folder / "tensorboard")
