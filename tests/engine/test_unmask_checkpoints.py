"""Checkpoints of ID3 contain unmasked weights alone, and training resumes from them, also on other numbers of ranks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests import distributed
from tests.engine import parity
from tests.engine.dense_id3 import Case, attach, masks_of, start
from tests.engine.parity import Cell, build_model, full_weights, largest_difference, train_step
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.store import CheckpointError, Store
from trainer.updates.unmask import target


def saved(rank: int, case: Case, folder: Path, stop: int) -> None:
    engine, sparse = start(case)
    checkpoints = Checkpoints(sparse, folder, keep=1, asynchronous=False)
    for step in range(stop):
        train_step(case.cell, engine, step, rank)
        checkpoints.save(step + 1, {})  # a later one holds what changed since, across switches
    engine.destroy()


def finished(rank: int, case: Case, folder: Path | None) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """Return weights, masks and counts at the end, from the start or from the checkpoint in `folder`."""
    engine, sparse = start(case)
    step = 0
    if folder is not None:
        (step,) = Store(folder).steps()
        Checkpoints(sparse, folder, keep=1, asynchronous=False).resume(Store(folder), step)
    for number in range(step, case.cell.steps):
        train_step(case.cell, engine, number, rank)
    result = full_weights(engine), masks_of(engine, sparse), sparse.update.state_dict()
    engine.destroy()
    return result


def _resumed(rank: int, workspace: Path) -> list[str]:
    problems = []
    for number, (case, stop, stage) in enumerate(
        (
            (Case(Cell(selector="all", stage=3, steps=7, weight_decay=0.1), bias_correction="local"), 3, 3),
            (Case(Cell(selector="uniform", stage=2, bank="discard", steps=7)), 3, 3),
            (Case(Cell(selector="uniform", stage=3, bank="discard", interval=1, steps=7)), 5, 3),
        )
    ):
        weights, masks, counts = finished(rank, case, None)
        saved(rank, case, workspace / str(number), stop)
        other = replace(case, cell=replace(case.cell, stage=stage))
        again, its_masks, its_counts = finished(rank, other, workspace / str(number))
        difference = largest_difference(weights, again)
        same = all(torch.equal(masks[n], its_masks[n]) for n in masks) and counts == its_counts
        if not same or not difference <= (0.0 if stage == case.cell.stage else 1e-6):
            problems.append(f"{case}: resumed after {stop} on stage {stage}: off by {difference}, same masks {same}")
        for file in (workspace / str(number)).rglob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                problems += [f"{file}: {key}" for key in opened.keys() if key.startswith(("weight:", "master:"))]  # noqa: SIM118
    return (
        problems
        + _longer(rank, workspace / "0")
        + _another_base(rank, workspace / "0")
        + _another_rule(rank, workspace / "0")
    )


def _longer(rank: int, folder: Path) -> list[str]:
    """Resume with more steps for the mask to grow in: it stays until it is as large as it should be, and then grows."""
    case = Case(Cell(selector="all", stage=3, steps=12, weight_decay=0.1), bias_correction="local", steps=15)
    engine, sparse = start(case)
    Checkpoints(sparse, folder, keep=1, asynchronous=False).resume(Store(folder), 3)
    sizes = []
    for step in range(3, case.cell.steps):
        train_step(case.cell, engine, step, rank)
        sizes.append(sparse.update.unmasked)  # type: ignore[attr-defined]
    engine.destroy()
    reached = target(3, budget=case.budget, steps=5)
    wanted = [max(reached, target(step + 1, budget=case.budget, steps=15)) for step in range(3, case.cell.steps)]
    return [] if sizes == wanted and wanted[1] == reached < wanted[-1] else [f"unmasked {sizes}, wanted {wanted}"]


def _another_rule(rank: int, folder: Path) -> list[str]:
    engine, sparse = parity.start(Cell(selector="all", stage=3), rank)
    try:
        Checkpoints(sparse, folder, keep=1, asynchronous=False).resume(Store(folder), 3)
    except CheckpointError as error:
        return [] if "trained with update rule Unmask, but this run has Dense" in str(error) else [str(error)]
    finally:
        engine.destroy()
    return ["a checkpoint of unmasked weights went into dense training"]


def _another_base(rank: int, folder: Path) -> list[str]:
    case = Case(Cell(selector="all", stage=3, steps=7, weight_decay=0.1), bias_correction="local")
    model = build_model(case.cell)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] += 1.0
    engine, sparse = attach(case, model)
    try:
        Checkpoints(sparse, folder, keep=1, asynchronous=False).resume(Store(folder), 3)
    except CheckpointError as error:
        return [] if "not the one that this run began with: block-002 differs" in str(error) else [str(error)]
    finally:
        engine.destroy()
    return ["a checkpoint went onto another base"]


def test_a_checkpoint_holds_unmasked_weights_and_goes_on_exactly(tmp_path: Path) -> None:
    for problems in distributed.run(_resumed, tmp_path, ranks=2):
        assert not problems


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    case = Case(Cell(selector="all", stage=3, steps=7, ranks=4))
    weights, masks, _ = distributed.run(finished, case, None, ranks=4)[0]
    distributed.run(saved, case, tmp_path, 3, ranks=4)
    for ranks in (1, 2):
        shutil.copytree(tmp_path, tmp_path.with_name(f"on-{ranks}"))
        other = replace(case, cell=replace(case.cell, ranks=ranks))
        again, its_masks, _ = distributed.run(finished, other, tmp_path.with_name(f"on-{ranks}"), ranks=ranks)[0]
        assert largest_difference(again, weights) <= 1e-6
        assert all(torch.equal(its_masks[n], masks[n]) for n in masks)
