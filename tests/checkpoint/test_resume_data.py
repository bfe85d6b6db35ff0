"""Resuming with other data is refused by the key that changed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import forked
from tests.launching import write_inputs
from trainer.config import load
from trainer.data.batches import SampleOrder
from trainer.data.errors import DataError
from trainer.run.resuming import RunState, changed_data
from trainer.run.training_record import TrainingRecord

VALUES = ["tiny.yaml", "selector.interval=1", "eval.every=null", "data.eval_fraction=0"]


@pytest.mark.slow
def test_a_resume_with_another_length_or_file_names_it(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    assert forked.run([*VALUES, "train.steps=1"], tmp_path, ranks=1).code == 0
    resume = ["train.steps=2", "resume=runs/tiny", "output=runs/more"]
    refused = forked.run([*VALUES, *resume, "data.max_length=47", "data.overflow=drop"], tmp_path, ranks=1)
    assert refused.code == 2 and "Traceback" not in refused.everything
    assert "\ndata.max_length: 48 in the checkpoint, 47 now; change it back" in refused.stderr
    assert "\ndata.overflow: 'truncate' in the checkpoint, 'drop' now; change it back" in refused.stderr
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"question": "1 and 1?", "answer": "2"}) + "\n")
    refused = forked.run([*VALUES, *resume], tmp_path, ranks=1)
    assert refused.code == 2
    assert "\ndata.train[0].path: its content is not the same as in the checkpoint; change it back" in refused.stderr


def test_the_configuration_of_an_earlier_version_tells_what_changed(tmp_path: Path) -> None:
    """Its checkpoints record a fingerprint alone; keys that it did not know are no change."""
    (tmp_path / "a.jsonl").write_text("{}\n")
    values = [
        "model.random={model_type: llama}", f"data.train={tmp_path / 'a.jsonl'}", "train.steps=1",
        "train.global_batch_size=1",
    ]  # fmt: skip
    saved = load(None, values).model_dump(mode="json")
    for source in saved["data"]["train"]:
        del source["ignore"]
    now = load(None, [*values, "data.max_length=47"])
    assert changed_data(saved, now) == ["data.max_length: 1024 in the checkpoint, 47 now"]

    history: Any = SimpleNamespace(_config=now, _batches=_batches("x", {"data.max_length": 47}))
    data = _batches("y", {}).state(3)
    del data["made_of"]
    state = RunState(config=saved, data=data, scheduler={}, evaluations=[], skipped=0, last_loss=None, meter=(0.0, 0.0))
    with pytest.raises(DataError) as error:
        TrainingRecord._resume_data(history, state)
    assert error.value.problems[0].startswith("data.train: not the samples of the run to resume")
    assert error.value.problems[1:] == ["data.max_length: 1024 in the checkpoint, 47 now"]


def _batches(fingerprint: str, made_of: dict[str, Any]) -> SampleOrder:
    return SampleOrder(
        [4], seed=0, global_batch_size=1, micro_batch_size=1, rank=0, ranks=1, fingerprint=fingerprint,
        made_of=made_of, earlier_fingerprint="z",
    )  # fmt: skip
