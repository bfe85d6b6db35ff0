"""A checkpoint, an adapter and a delta that 678ef04 wrote are still resumed, opened and applied.

The files are of a Llama of three blocks of width 16, trained for six steps on one rank: `base`, a run from it that has
its checkpoint after step 3 only, that run's last weights (`expected.safetensors`) and its delta, and a LoRA adapter.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import forked
from tests.comparing import largest_difference
from tests.launching import metrics
from trainer.checkpoint.store import sealed

EARLIER = Path(__file__).parent / "678ef04"
WROTE_IN = "/earlier"  # the folder in which the files were written


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A copy of the files, in which paths are those of the copy."""
    workspace = tmp_path / "earlier"
    shutil.copytree(EARLIER, workspace)
    (workspace / "trained").rename(workspace / "runs")  # a name that git ignores
    for file in workspace.rglob("*"):
        if file.suffix in (".json", ".yaml"):
            file.write_text(file.read_text().replace(WROTE_IN, str(workspace)))
    manifest = workspace / "runs" / "from_base" / "checkpoints" / "step-00000003.json"
    body = json.loads(manifest.read_text())
    del body["checksum"]  # of the paths that were there
    manifest.write_bytes(sealed(body))
    return workspace


def test_a_checkpoint_is_resumed_to_the_same_end(workspace: Path) -> None:
    """The block drawn last is drawn again at the switch to come; 678ef04 kept its state, and so does this run."""
    values = ["model.random=null", "model.tokenizer=null", "model.path=base", "output=runs/from_base"]
    off = "always_on={embeddings: false, head: false, norm: false}"
    finished = forked.run(["tiny.yaml", *values, off], workspace, ranks=1)
    assert finished.code == 0, finished.everything
    assert "resuming after step 3, from runs/from_base/checkpoints/step-00000003.json" in finished.stderr
    assert "bank.redrawn is keep in this run, not reset: it began with a version in which" in finished.stderr
    assert [line["step"] for line in metrics(workspace / "runs" / "from_base") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    found = load_file(workspace / "runs" / "from_base" / "model" / "model.safetensors")
    assert largest_difference(found, load_file(workspace / "expected.safetensors")) <= 1e-6


def test_an_adapter_is_opened_and_trained_on(workspace: Path) -> None:
    values = ["method=lora", "substrate.adapter=runs/adapter/adapter", "train.steps=1", "schedule.warmup_steps=0"]
    base = ["model.random=null", "model.tokenizer=null", "model.path=base", "output=runs/more"]
    finished = forked.run(["tiny.yaml", *base, *values, "selector={name: all}"], workspace, ranks=1)
    assert finished.code == 0, finished.everything
    before, after = (
        load_file(workspace / "runs" / run / "adapter" / "adapter_model.safetensors") for run in ("adapter", "more")
    )
    assert before.keys() == after.keys() and 0 < largest_difference(before, after) < 0.1
    model = AutoModelForCausalLM.from_pretrained(workspace / "base")
    PeftModel.from_pretrained(model, str(workspace / "runs" / "adapter" / "adapter"))


def test_a_delta_is_applied_with_a_notice_of_what_it_does_not_record(workspace: Path) -> None:
    applied = forked.command(["apply", "base", "delta", "out"], workspace)
    assert applied.code == 0, applied.everything
    found, expected = load_file(workspace / "out" / "model.safetensors"), load_file(workspace / "expected.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert json.loads((workspace / "delta" / "delta.json").read_text())["format"] == 1
    assert "earlier version" in applied.everything, applied.everything
