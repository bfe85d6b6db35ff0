"""`engine.save_checkpoint` and `engine.load_checkpoint` of an attached engine: what everybody calls works."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import distributed
from tests.engine.parity import Cell, full_weights, start, train_step
from trainer.checkpoint.store import CheckpointError
from trainer.config import load
from trainer.run.folder import take_folder

CELL = Cell(stage=1, bank="cpu", schedule="cosine", steps=8)
RUN = ["method=lisa", "train.steps=1", "train.global_batch_size=1", "data.train=x.jsonl", "model.path=/x"]
STOP = 5  # in the middle of an interval of two


def _trained(rank: int, workspace: Path) -> dict[str, Tensor]:
    engine, _ = start(CELL, rank)
    for step in range(CELL.steps):
        if step == STOP:
            assert engine.save_checkpoint(workspace, client_state={"note": [1, "two"]})
            engine.save_checkpoint(workspace, tag="best", save_latest=False, exclude_frozen_parameters=True)
        train_step(CELL, engine, step, rank)
    engine.save_checkpoint(workspace, tag="last", save_latest=False)
    weights = full_weights(engine)
    engine.destroy()
    return weights


def _messages(engine: Any, workspace: Path) -> dict[str, str]:
    """What each call says that cannot be honoured."""
    theirs = workspace / "theirs" / "global_step5"
    theirs.mkdir(parents=True, exist_ok=True)
    (theirs / "mp_rank_00_model_states.pt").touch()
    messages = {}
    for name, call in {
        "DeepSpeed's": lambda: engine.load_checkpoint(workspace / "theirs", tag="global_step5"),
        "weights alone": lambda: engine.load_checkpoint(workspace, load_module_only=True),
        "no JSON": lambda: engine.save_checkpoint(workspace, tag="x", client_state={"a": torch.zeros(1)}),
    }.items():
        try:
            call()
        except CheckpointError as error:
            messages[name] = str(error)
    return messages


def _everything(rank: int, workspace: Path) -> dict[str, Any]:
    expected = _trained(rank, workspace)
    engine, sparse = start(CELL, rank)
    answers: dict[str, Any] = {
        "messages": _messages(engine, workspace),
        "nothing": engine.load_checkpoint(workspace / "none"),
    }
    engine.load_checkpoint(workspace, tag="best")
    answers["best"] = (sparse.steps, sparse.active)
    # Into an engine that has trained on: blocks return to what they were.
    answers["last"] = engine.load_checkpoint(workspace, tag="last")[0]
    answers["folder"], answers["client_state"] = engine.load_checkpoint(workspace)
    answers["back"] = (sparse.steps, sparse.active)
    engine.save_checkpoint(workspace, tag="last", save_latest=False)  # an earlier step under the name of a later one
    for step in range(STOP, CELL.steps):
        train_step(CELL, engine, step, rank)
    found = full_weights(engine)
    answers["differing"] = [name for name in expected if not torch.equal(expected[name], found[name])]
    engine.load_checkpoint(workspace, tag="last")
    answers["overwritten"] = sparse.steps
    engine.destroy()
    return answers


def test_engine_checkpoints_go_on_exactly(tmp_path: Path) -> None:
    for answers in distributed.run(_everything, tmp_path, ranks=2):
        assert answers["differing"] == []
        assert answers["nothing"] == (None, None)
        assert answers["folder"] == str(tmp_path / f"global_step{STOP}")
        assert answers["client_state"] == {"note": [1, "two"]}
        assert answers["best"] == answers["back"] and answers["back"][0] == STOP
        assert answers["last"] == str(tmp_path / "last") and answers["overwritten"] == STOP
        messages = answers["messages"]
        assert "that DeepSpeed wrote contains the optimizer state of one active set only" in messages["DeepSpeed's"]
        assert "without load_module_only" in messages["weights alone"]
        assert "client_state cannot be saved" in messages["no JSON"]
    assert (tmp_path / "latest").read_text() == f"global_step{STOP}"
    assert not list(tmp_path.rglob("*.partial"))
    # A run of `trainer train` does not resume them, and says who does.
    for resume in (tmp_path, tmp_path / "last", tmp_path / "best" / "checkpoints"):
        with pytest.raises(CheckpointError, match="resume: .*engine.save_checkpoint"), ExitStack() as leaving:
            config = load(None, [*RUN, f"output={tmp_path}/run", f"resume={resume}"], check_files=False)
            take_folder(config, (), leaving)
    assert not (tmp_path / "run").exists()
