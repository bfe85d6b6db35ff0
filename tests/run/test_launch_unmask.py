"""ID3 through the real launcher: as many weights of the base as the budget move, and no others."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import forked
from tests.launching import metrics, write_inputs
from tests.run.test_launch_adapters import write_base
from trainer.cli.main import main

BUDGET = 157
ID3 = [
    "method=id3",
    f"update.budget={BUDGET}",
    "update.growth_steps=5",
    "model.random=null",
    "model.path=base",
    "train.steps=8",
    "optimizer.lr=2.0e-2",
    "selector={name: all}",
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ID3 ran on two ranks; with four samples to a step two micro-batches, over which it sums."""
    workspace = tmp_path_factory.mktemp("id3")
    write_inputs(workspace)
    write_base(workspace)
    finished = forked.run(["tiny.yaml", *ID3], workspace)
    assert finished.code == 0, finished.everything
    assert f"Unmasked {BUDGET} weights of a budget of {BUDGET}." in finished.everything
    return workspace


def test_as_many_weights_as_the_budget_move_and_the_loss_falls(workspace: Path) -> None:
    folder = workspace / "runs" / "tiny"
    lines = [line for line in metrics(folder) if "unmasked" in line]
    assert [line["unmasked"] for line in lines] == [32, 64, 95, 126, 157, 157, 157, 157]
    assert all(line["grad_norm"] > 0 for line in lines)
    losses = [line["eval_loss"] for line in metrics(folder) if "eval_loss" in line]
    assert losses[-1] < losses[0] and math.isfinite(losses[-1])
    base, trained = (load_file(next(f.glob("*.safetensors"))) for f in (workspace / "base", folder / "model"))
    assert base.keys() == trained.keys()
    moved = sum(int((base[name] != trained[name]).sum()) for name in base)
    assert moved == BUDGET
    assert sum(f.stat().st_size for f in (folder / "checkpoints").rglob("block-*.safetensors")) < 60_000


def test_exports_from_the_checkpoint_and_a_delta_of_unmasked_weights_alone(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, base = str(workspace / "runs" / "tiny"), str(workspace / "base")
    trained = load_file(workspace / "runs" / "tiny" / "model" / "model.safetensors")
    assert main(["export", run, str(tmp_path / "whole"), "--base", base]) == 0
    assert main(["export", run, str(tmp_path / "delta"), "--delta", "--base", base]) == 0
    assert main(["apply", base, str(tmp_path / "delta"), str(tmp_path / "applied")]) == 0
    for name in ("whole", "applied"):
        written = load_file(tmp_path / name / "model.safetensors")
        assert written.keys() == trained.keys()
        assert all(torch.equal(written[key], trained[key]) for key in trained)
    delta = load_file(tmp_path / "delta" / "delta.safetensors")
    assert all(key.startswith(("indices:", "values:")) for key in delta)
    assert sum(tensor.numel() for tensor in delta.values()) == 2 * BUDGET

    for key, value, words in (
        ("dtype", "fp64", "dtype: Input should be 'bf16', 'fp16' or 'fp32', got 'fp64'"),
        ("sha256", [], "sha256: Input should be an object, got '[]'"),
        ("fingerprints", {}, "has no fingerprint of"),
    ):
        shutil.copytree(tmp_path / "delta", tmp_path / "edited", dirs_exist_ok=True)
        info = json.loads((tmp_path / "delta" / "delta.json").read_text())
        (tmp_path / "edited" / "delta.json").write_text(json.dumps({**info, key: value}))
        assert main(["apply", base, str(tmp_path / "edited"), str(tmp_path / "wrong")]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / 'edited' / 'delta.json'}: was changed" in error and words in error
    renamed = {key.replace(".0.", ".7."): tensor for key, tensor in delta.items()}
    save_file(renamed, tmp_path / "edited" / "delta.safetensors")
    digests = {key.replace(".0.", ".7."): value for key, value in info["sha256"].items()}
    (tmp_path / "edited" / "delta.json").write_text(json.dumps({**info, "sha256": digests}))
    assert main(["apply", base, str(tmp_path / "edited"), str(tmp_path / "wrong")]) == 2
    assert ".7." in (error := capsys.readouterr().err) and "is not in the base model" in error
    (tmp_path / "edited" / "delta.safetensors").write_bytes(b"short")
    assert main(["apply", base, str(tmp_path / "edited"), str(tmp_path / "wrong")]) == 2
    assert "delta.safetensors: cannot be read" in capsys.readouterr().err

    other = tmp_path / "other"
    shutil.copytree(base, other)
    changed = load_file(other / "model.safetensors")
    changed["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    assert main(["apply", str(other), str(tmp_path / "delta"), str(tmp_path / "wrong")]) == 2
    assert not (tmp_path / "wrong").exists()


def test_infinite_scores_end_the_run_with_what_to_change(workspace: Path) -> None:
    """After a warning, for the mask would be whole before every block has trained."""
    values = ["update.exp=1.0e+30", "selector={name: cyclic, blocks: 1, interval: 2}", "bank.name=device"]
    finished = forked.run(["tiny.yaml", *ID3, *values, "output=runs/infinite"], workspace)
    assert finished.code == 2, finished.everything
    assert "the mask is complete after 5 steps (update.growth_steps)" in finished.everything
    assert "stopped at step 1: update.eps: got 0.001 with update.exp 1e+30, for which" in finished.everything
    assert "Traceback" not in finished.everything
