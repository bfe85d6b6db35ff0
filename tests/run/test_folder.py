"""Choose a run's folder, and leave nothing there when the run is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch import distributed as torch_distributed

from tests import distributed
from tests.run.folders import (
    MANIFEST,
    STEPS,
    begun,
    configure,
    contents,
    finished,
    said,
    save,
    state_of,
    stopped,
    take,
    write_model,
)
from trainer.checkpoint.lease import LeaseError, this_process
from trainer.checkpoint.store import CheckpointError
from trainer.run.folder import start_run_folder, take_folder
from trainer.run.resuming import FinishedError


def _refused(rank: int, workspace: Path) -> None:
    with pytest.raises(ZeroDivisionError), start_run_folder(configure(workspace)) as run:
        folder = run.path
        if rank == 0:
            assert (folder / "config.yaml").exists()
            (folder / "tensorboard" / "deep").mkdir(parents=True)
            (folder / "tensorboard" / "deep" / "events").write_text("x")
        torch_distributed.barrier()
        raise ZeroDivisionError
    torch_distributed.barrier()


def _cases(rank: int, workspace: Path) -> str:
    _refused(rank, workspace / "new" / "run")
    assert not (workspace / "new" / "run").exists()
    before = contents(workspace / "mine")
    torch_distributed.barrier()  # rank 0 writes there next, and once more after that
    _refused(rank, workspace / "mine")
    assert contents(workspace / "mine") == before
    torch_distributed.barrier()

    with start_run_folder(configure(workspace / "mine")) as run:
        folder = run.path
        assert folder == workspace / "mine"
        (folder / "metrics.jsonl").touch()
        torch_distributed.barrier()
    torch_distributed.barrier()
    with start_run_folder(configure(workspace / "mine", "optimizer.lr=1")) as second:
        assert second.path == workspace / "mine-2"
        (second.path / "metrics.jsonl").touch()
        torch_distributed.barrier()
    torch_distributed.barrier()
    if rank == 0:
        write_model(workspace / "mine")
    with pytest.raises(FinishedError, match="is finished, and there is nothing left to do"):
        with start_run_folder(configure(workspace / "mine")):
            pass
    return (folder / "config.yaml").read_text()


def test_a_refused_run_leaves_nothing_of_its_own_and_all_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "mine" / "notes").mkdir(parents=True)
    (tmp_path / "mine" / "train.py").write_text("mine")
    first, second = distributed.run(_cases, tmp_path, ranks=2)
    assert first == second and "method: lisa" in first
    assert (tmp_path / "mine" / "train.py").read_text() == "mine"
    assert (tmp_path / "mine-2" / "config.yaml").exists()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_in_the_same_folder(run: Path) -> None:
    begun(run)
    workspace = take(configure(run))
    assert (workspace.path, workspace.origin, workspace.remarks) == (run, None, ())


def test_a_run_with_checkpoints_resumes(run: Path) -> None:
    stopped(run)
    workspace = take(configure(run))
    assert (
        workspace.path == run and workspace.origin is not None and workspace.origin.store.folder == run / "checkpoints"
    )


@pytest.mark.parametrize("left", ["lease.json", ".lease.lock", "{}/.lock"])
@pytest.mark.parametrize("more", [(), ("method=lora",)], ids=["model", "adapter"])
def test_a_finished_run_is_finished_and_says_how_to_train_anew(run: Path, more: tuple[str, ...], left: str) -> None:
    """What it left because it was killed after its model was written is cleared up."""
    finished(run, *more)
    before = contents(run)
    dead = replace(this_process({}), process=2**22 + 1)  # a number that no process has
    (run / left.format("adapter" if more else "model")).write_text(json.dumps(asdict(dead)))
    (run / ".config.yaml.0123456789abcdef.partial").touch()
    with pytest.raises(FinishedError) as refusal:
        take(configure(run, *more))
    assert f"The run in {run} is finished" in str(refusal.value)
    assert str(run / ("adapter" if more else "model")) in str(refusal.value)
    assert "set resume=never or another output" in str(refusal.value)
    assert contents(run) == before and not run.with_name("run-2").exists()


@pytest.mark.parametrize(
    "damage", ["emptied", "weights", "cut", "config", "null", "shard", "no shards", "odd shards", "pipe"]
)
@pytest.mark.parametrize("more", [(), ("method=lora",)], ids=["model", "adapter"])
def test_a_finished_run_whose_model_was_cut_is_refused_and_the_file_named(
    run: Path, more: tuple[str, ...], damage: str
) -> None:
    """Not taken for the model that was asked for, nor written over."""
    finished(run, *more)
    folder, stem = (run / "adapter", "adapter_model") if more else (run / "model", "model")
    file = folder / f"{stem}.safetensors"
    if damage == "emptied":
        shutil.rmtree(folder)
        folder.mkdir()
    elif damage == "weights":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "config":
        (folder / ("adapter_config.json" if more else "config.json")).write_text('{"a": ')
    elif damage == "null":
        (folder / ("adapter_config.json" if more else "config.json")).write_text("null")
    elif "shard" in damage:
        maps = {"shard": {"weight": file.name, "other": file.name}, "no shards": {}, "odd shards": {"weight": 1}}
        index = {"weight_map": maps[damage]}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    else:
        file.unlink()
        os.mkfifo(file)
    with pytest.raises(CheckpointError) as refusal:
        take(configure(run, *more))
    named = str(folder) if damage in ("emptied", "config", "null", "no shards", "odd shards") else str(file)
    assert str(refusal.value).startswith(f"{named}: ")
    assert str(refusal.value).endswith(f". Remove {folder}, and the same command resumes from the newest checkpoint")
    shutil.rmtree(folder)
    workspace = take(configure(run, *more))
    assert (
        workspace.path == run
        and workspace.origin is not None
        and workspace.origin.find(configure(run, *more))[0] == STEPS
    )


@pytest.mark.parametrize("more", ["output={}/../run", "checkpoint.every=7", "data.cache=/x", "train.timeout_minutes=9"])
def test_what_does_not_make_another_run_is_no_reason_to_train_a_finished_one_anew(run: Path, more: str) -> None:
    finished(run)
    with pytest.raises(FinishedError):
        take(configure(run, more.format(run)))


def test_a_finished_run_with_other_settings_is_left_alone_and_the_way_on_from_it_is_named(run: Path) -> None:
    finished(run)
    longer = configure(run, "train.steps=9")
    workspace = take(longer)
    assert workspace.path == run.with_name("run-2") and workspace.origin is None
    assert said(workspace) == (
        f"{run} contains a finished run with other settings (train.steps: 6 there, 9 now); resume={run} "
        f"resumes from it; this run starts anew in {workspace.path}"
    )
    onwards = take(configure(run, "train.steps=9", f"resume={run}"))
    assert onwards.origin is not None and onwards.origin.find(longer)[0] == STEPS


@pytest.mark.parametrize("more", ["selector.blocks=3", "data.max_length=9"])
def test_the_way_on_is_not_named_where_it_would_be_refused(run: Path, more: str) -> None:
    finished(run)
    line = said(take(configure(run, more)))
    assert "contains a finished run with other settings" in line and "resume=" not in line


def test_other_samples_under_the_same_name_are_other_settings(run: Path) -> None:
    finished(run)
    with pytest.raises(FinishedError):
        take(configure(run), "abc")
    assert "(data.train (its samples): 'abc' there, 'def' now)" in said(take(configure(run), "def"))


def test_the_same_command_finds_its_folder_behind_others(run: Path) -> None:
    """A finished one, one that saved nothing, and something that nobody can read, each left as it is."""
    finished(run)
    begun(run.with_name("run-2"), "seed=1")
    write_model(run.with_name("run-3"))
    before = contents(run.parent)
    workspace = take(configure(run, "seed=2"))
    assert workspace.path == run.with_name("run-4") and contents(run.parent) == before
    for words in ("finished run with other settings (seed: 0 there, 2 now)", "and no checkpoint", "is not changed"):
        assert words in said(workspace)
    stopped(run.with_name("run-4"), "seed=2")
    assert take(configure(run, "seed=2")).path == run.with_name("run-4")
    write_model(run.with_name("run-4"))
    with pytest.raises(FinishedError, match="run-4"):
        take(configure(run, "seed=2"))
    assert take(configure(run, "seed=1")).path == run.with_name("run-2")


def test_settings_that_do_not_fit_are_refused_and_change_nothing(run: Path) -> None:
    stopped(run)
    before = (run / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match=rf"in {run}: selector.blocks: 2 in the checkpoint, 3 now. Change"):
        take(configure(run, "selector.blocks=3"))
    assert (run / "config.yaml").read_text() == before
    assert contents(run) == {"config.yaml", "metrics.jsonl", "checkpoints", "checkpoints/pool", MANIFEST}


def test_never_takes_a_folder_that_has_nothing_of_a_run(run: Path) -> None:
    for state, folder in ((begun, "run"), (stopped, "run-2"), (finished, "run-3")):
        state(run.with_name(folder), "resume=never")
    assert take(configure(run, "resume=never")).path == run.with_name("run-4")


def test_a_path_takes_that_folder_or_one_of_a_run_that_began_with_it(run: Path) -> None:
    stopped(run)
    other = run.with_name("other")
    finished(other)
    resume = f"resume={other}"
    workspace = take(configure(run, resume))
    assert workspace.path == run.with_name("run-2") and workspace.origin is not None
    assert workspace.origin.store.folder == other / "checkpoints"
    begun(run.with_name("run-2"), resume)
    workspace = take(configure(run, resume))  # killed before its first checkpoint
    assert workspace.path == run.with_name("run-2") and workspace.origin.store.folder == other / "checkpoints"
    stopped(run.with_name("run-2"), resume)
    workspace = take(configure(run, resume))
    assert workspace.path == run.with_name("run-2") and workspace.origin.store.folder == workspace.path / "checkpoints"
    finished(run.with_name("run-2"), resume)
    with pytest.raises(FinishedError, match="run-2"):
        take(configure(run, resume))
    own = take(configure(run, f"resume={run}/{MANIFEST}"))
    assert own.path == run and own.origin is not None and own.origin.step == 3


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_requeued_job_finds_its_folder_whatever_it_is_told(
    run: Path, resume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`never` means what somebody submits, not what the scheduler starts once more."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    finished(run, "seed=3")
    workspace, lease = take_folder(configure(run, f"resume={resume}"), (), ExitStack())
    assert workspace.path == run.with_name("run-2")
    (workspace.path / "metrics.jsonl").touch()
    lease._released.set()  # its node was lost
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert take(configure(run, f"resume={resume}", "optimizer.lr=1")).path == workspace.path
    save(workspace.path, state_of(configure(run, f"resume={resume}"), job="SLURM job 7"))
    again = take(configure(run, f"resume={resume}"))
    assert again.path == workspace.path and again.origin is not None
    write_model(workspace.path)
    with pytest.raises(FinishedError, match="run-2"):
        take(configure(run, f"resume={resume}"))


def test_a_run_that_trains_there_is_named_whatever_the_settings(run: Path) -> None:
    with ExitStack() as leaving:
        take_folder(configure(run), (), leaving)
        for more in ((), ("seed=1",)):
            with pytest.raises(LeaseError, match=rf"another run trains in {run}: process {os.getpid()}"):
                take(configure(run, *more))
    assert not run.exists()


def test_a_signal_at_any_line_of_taking_a_folder_leaves_nothing(run: Path) -> None:
    """A handler that raises does so between any two instructions of Python. An empty lock may remain."""
    lines = reached = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal reached
        code = frame.f_code
        if Path(code.co_filename).stem not in ("folder", "lease", "disk") or "lock" in code.co_name:
            return None  # a lock that was just taken delays the cleaning up by its time limit
        if event == "line":
            reached += 1
            if reached == lines:
                sys.settrace(None)
                raise SystemExit(75)
        return trace

    earlier, config = sys.gettrace(), configure(run)
    taken = False
    while not taken:
        lines, reached = lines + 1, 0
        with suppress(SystemExit), ExitStack() as leaving:
            sys.settrace(trace)
            try:
                take_folder(config, (), leaving)
                taken = True
            finally:
                sys.settrace(earlier)
        assert not run.exists() or contents(run) <= {".lease.lock"}, f"line {lines}"
    assert lines > 100
