"""ID3 through the real launcher: as many weights of the base as the budget move, and no others."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.launching import deepspeed, launch, metrics, write_inputs
from tests.test_launch_adapters import write_base

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
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("id3")
    write_inputs(place)
    write_base(place)
    return place


def test_as_many_weights_as_the_budget_move_and_the_loss_falls(place: Path) -> None:
    # On two ranks with four samples to a step two micro-batches, over which gradients are summed.
    finished = launch(deepspeed("tiny.yaml", *ID3), place)
    assert finished.code == 0, finished.everything
    folder = place / "runs" / "tiny"
    lines = [line for line in metrics(folder) if "unmasked" in line]
    assert [line["unmasked"] for line in lines] == [32, 64, 95, 126, 157, 157, 157, 157]
    losses = [line["eval_loss"] for line in metrics(folder) if "eval_loss" in line]
    assert losses[-1] < losses[0] and math.isfinite(losses[-1])
    base, trained = (load_file(next(f.glob("*.safetensors"))) for f in (place / "base", folder / "model"))
    assert base.keys() == trained.keys()
    moved = sum(int((base[name] != trained[name]).sum()) for name in base)
    assert moved == BUDGET
    assert sum(f.stat().st_size for f in (folder / "checkpoints").rglob("block-*.safetensors")) < 60_000
