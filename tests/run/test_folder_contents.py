"""Take or refuse a folder that other versions, other loops, damage or the user left, and follow no link."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.run.folders import MANIFEST, begun, configure, contents, finished, said, save, state_of, stopped, take
from trainer.checkpoint.lease import LeaseError, this_process
from trainer.checkpoint.store import CheckpointError
from trainer.config import dump
from trainer.run.folder import take_folder
from trainer.run.resuming import FinishedError, differences


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["metrics.jsonl", "adapter", "importance.png", "model", "tensorboard"])
def test_what_a_run_writes_is_never_written_over(run: Path, name: str) -> None:
    """Also where somebody has kept only that."""
    (run / name).mkdir(parents=True)
    workspace = take(configure(run))
    assert workspace.path == run.with_name("run-2") and f"there is no {run / 'config.yaml'}" in said(workspace)


def test_a_setting_that_came_later_is_not_another_one(run: Path) -> None:
    """But a key that is missing in what the user spells out is."""
    config = configure(run, "model.path=null", "model.random={model_type: llama, hidden_size: 32}")
    saved = config.model_dump(mode="json")
    del saved["bank"], saved["data"]["train"][0]["weight"], saved["train"]["guard_every"]
    assert list(differences(saved, config)) == []
    del saved["model"]["random"]["hidden_size"]
    saved["data"]["train"][0]["path"] = "y.jsonl"
    assert list(differences(saved, config)) == [
        ("model.random.hidden_size", None, 32),
        ("data.train[0].path", "y.jsonl", "x.jsonl"),
    ]


def test_a_folder_of_another_loop_is_refused_by_name_and_never_trained_in(run: Path) -> None:
    """`engine.save_checkpoint`'s and transformers' folders, and those of `Checkpoints` with states of any kind."""
    for index, state in enumerate(({"client_state": {}, "scheduler": None}, {}, {"config": 1}, {"note": [1]})):
        folder = run / f"global_step{index}"
        save(folder, state)
        for resume in (folder, f"{folder}/{MANIFEST}", folder / "checkpoints"):
            with pytest.raises(CheckpointError, match="saved by another training loop .*Resume it in that loop"):
                take(configure(run.with_name("out"), f"resume={resume}"))
        assert take(configure(folder)).path == run / f"global_step{index}-2"
    (run / "latest").write_text("global_step1")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* of engine.save_checkpoint or .*global_step0"):
        take(configure(run.with_name("out"), f"resume={run}"))
    with pytest.raises(CheckpointError, match="no such folder"):
        take(configure(run.with_name("out"), f"resume={run}/nowhere"))
    assert not run.with_name("out").exists()


def test_a_state_with_odd_content_is_refused_by_its_key(run: Path) -> None:
    for changes in ({"skipped": "x"}, {"evaluations": [[1]]}, {"meter": None}, {"data": []}):
        config = configure(run)
        begun(run)
        save(run, state_of(config, **changes))
        with pytest.raises(CheckpointError, match=rf"{MANIFEST}: run.{next(iter(changes))}"):
            take(config)


def cut(text: bytes) -> bytes:
    return text[: len(text) // 2].rpartition(b"\n")[0] + b"\nselector: {name"


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda text: b"",
    "NULs": lambda text: bytes(len(text)),
    "binary": lambda text: os.urandom(len(text)),
    "cut": cut,
    "no YAML": lambda text: b"{" + text,
    "a list": lambda text: b"- 1\n",
    "of something else": lambda text: b"name: mine\n",
    "missing": lambda text: None,
}


def damage(file: Path, how: str) -> None:
    left = DAMAGE[how](file.read_bytes())
    file.unlink() if left is None else file.write_bytes(left)


@pytest.mark.parametrize("how", DAMAGE)
def test_settings_that_cannot_be_read_are_those_of_the_checkpoint(run: Path, how: str) -> None:
    stopped(run)
    damage(run / "config.yaml", how)
    workspace = take(configure(run))
    assert workspace.path == run and workspace.origin is not None
    assert str(run / "config.yaml") in said(workspace) and "its settings are those of its newest checkpoint" in said(
        workspace
    )
    assert not run.with_name("run-2").exists()
    with pytest.raises(CheckpointError, match="selector.blocks: 2 in the checkpoint, 3 now"):
        take(configure(run, "selector.blocks=3"))
    finished(run)
    damage(run / "config.yaml", how)
    with pytest.raises(FinishedError, match=f"The run in {run} is finished.*config.yaml"):
        take(configure(run))


def test_a_changed_figure_in_the_settings_makes_no_other_run_of_a_finished_one(run: Path) -> None:
    finished(run)
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("steps: 6", "steps: 7"))
    with pytest.raises(FinishedError):
        take(configure(run))


def test_a_run_of_which_nothing_can_be_read_is_refused_by_name(run: Path) -> None:
    stopped(run)
    for file in ("config.yaml", MANIFEST):
        damage(run / file, "NULs")
    with pytest.raises(CheckpointError) as refusal:
        take(configure(run))
    for words in (f"output: {run} has checkpoints", "config.yaml", MANIFEST, "resume=never"):
        assert words in str(refusal.value)
    assert take(configure(run, "resume=never")).path == run.with_name("run-2")


def test_a_damaged_checkpoint_names_an_older_one(run: Path) -> None:
    stopped(run)
    save(run, state_of(configure(run)), 5)
    damage(run / "checkpoints" / "step-00000005.json", "empty")
    with pytest.raises(CheckpointError, match=rf"step-00000005.json: cannot be read .*resume={run}/{MANIFEST}"):
        take(configure(run))


@pytest.mark.parametrize("moment", ["folder", "lock", "lease", "settings"])
def test_a_start_that_was_killed_leaves_the_folder_to_the_same_command(run: Path, moment: str) -> None:
    run.mkdir()
    if moment != "folder":
        (run / ".lease.lock").touch()
    if moment in ("lease", "settings"):
        (run / "lease.json").write_text(json.dumps(asdict(replace(this_process({}), process=2**22 + 1))))
        (run / ".config.yaml.0123456789abcdef.partial").write_text("meth")
        (run / ".lease.json.partial").touch()  # as versions before named it
    if moment == "settings":
        (run / "config.yaml").write_text(dump(configure(run)))
    with ExitStack() as leaving:
        workspace, _ = take_folder(configure(run), (), leaving)
        assert workspace.path == run and contents(run) == {"config.yaml", "lease.json", ".lease.lock"}
    assert not run.exists()


def test_no_link_is_followed(run: Path, tmp_path: Path) -> None:
    """None of another run's files is written to or read through it."""
    mine = tmp_path / "mine"
    mine.write_text("mine")
    run.mkdir()
    for name in (".config.yaml.partial", ".metrics.jsonl.partial", ".lease.json.partial"):
        (run / name).symlink_to(mine)
    workspace = take(configure(run))
    assert workspace.path == run
    for name in ("lease.json", ".lease.lock"):
        run.mkdir(exist_ok=True)
        (run / name).symlink_to(mine)
        with pytest.raises(LeaseError, match=f"{name}: .*link"):
            take(configure(run))
        (run / name).unlink()
    for name in ("lease.json", ".lease.lock"):  # nor is a pipe waited for, nor a folder taken for a file
        for make in (os.mkfifo, Path.mkdir):
            if (name, make) == (".lease.lock", os.mkfifo):
                continue  # a pipe can be locked as well as a file
            run.mkdir(exist_ok=True)
            make(run / name)
            with pytest.raises(LeaseError, match=f"{name}: .*not a regular file"):
                take(configure(run))
            shutil.rmtree(run)
    run.mkdir()
    (run / "config.yaml").symlink_to(tmp_path / "nowhere")
    assert take(configure(run)).path == run.with_name("run-2")
    assert mine.read_text() == "mine" and not (tmp_path / "nowhere").exists()
