"""Stopped and resumed is as if never stopped: bit for bit on the same ranks and stage, to 1e-6 on others."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trainer
from tests import distributed
from tests.engine.parity import Cell, _scores, full_weights, largest_difference, start, train_step
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.store import Store

TOLERANCE = 1e-6
STEPS, EVERY = 8, 4


def finish(cell: Cell, engine: Any, sparse: trainer.Sparse, rank: int, steps: Any) -> dict[str, Tensor]:
    drawn = []
    for step in steps:
        train_step(cell, engine, step, rank)
        drawn.append(sparse.active)
    weights = full_weights(engine) | _scores(sparse.selector)
    weights["drawn"] = torch.tensor(drawn[-2:]).float()
    engine.destroy()
    return weights


def undisturbed(rank: int, cell: Cell) -> dict[str, Tensor]:
    engine, sparse = start(cell, rank)
    return finish(cell, engine, sparse, rank, range(STEPS))


def save(checkpoints: Checkpoints, engine: Any, step: int) -> None:
    scheduler = engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None
    checkpoints.save(step, {"scheduler": scheduler})


def saved(rank: int, cell: Cell, folder: Path, stop: int, *, asynchronous: bool = False) -> None:
    engine, sparse = start(cell, rank)
    checkpoints = Checkpoints(sparse, folder, keep=2, asynchronous=asynchronous)
    for step in range(stop):
        train_step(cell, engine, step, rank)
        if (step + 1) % EVERY == 0 or step + 1 == stop:
            save(checkpoints, engine, step + 1)
    checkpoints.finish()
    engine.destroy()


def resumed(rank: int, cell: Cell, folder: Path) -> dict[str, Tensor]:
    torch.rand(3)
    engine, sparse = start(cell, rank)
    checkpoints = Checkpoints(sparse, folder, keep=2, asynchronous=False)
    (step, *_) = Store(folder).steps()
    state = checkpoints.resume(Store(folder), step)
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(state["scheduler"])
    return finish(cell, engine, sparse, rank, range(step, STEPS))


def saved_on_the_way(rank: int, cell: Cell, workspace: Path) -> dict[str, Tensor]:
    """Train to the end. Leave in `workspace` a folder `5`, whose newest checkpoint was written while training went on,
    and a folder `6`: in the middle of an interval of two, and at its end."""
    engine, sparse = start(cell, rank)
    checkpoints = Checkpoints(sparse, workspace / "6", keep=2, asynchronous=True)
    for step in range(6):
        train_step(cell, engine, step, rank)
        if step == 5:
            checkpoints.finish()
            if rank == 0:
                shutil.copytree(workspace / "6", workspace / "5")
            torch.distributed.barrier()
        if step >= 3:
            save(checkpoints, engine, step + 1)
    checkpoints.finish()
    return finish(cell, engine, sparse, rank, range(6, STEPS))


def _exact(rank: int, cells: list[Cell], workspace: Path) -> list[str]:
    problems = []
    for number, cell in enumerate(cells):
        expected = saved_on_the_way(rank, cell, workspace / str(number))
        found = {f"stopped after {stop}": resumed(rank, cell, workspace / str(number) / str(stop)) for stop in (5, 6)}
        if cell is cells[-1]:
            found["never saved"] = undisturbed(rank, cell)
        for what, weights in found.items():
            differing = [name for name in expected if not torch.equal(expected[name], weights[name])]
            if differing:
                off = largest_difference(expected, weights)
                problems.append(f"{cell}, {what}: {len(differing)} differ by {off:.2e}: {differing[:2]}")
    return problems


EXACT = [
    *(Cell(stage=stage, bank=bank, steps=STEPS) for stage in (0, 1, 2, 3) for bank in ("discard", "cpu")),
    Cell(stage=2, bank="device", selector="cyclic", blocks=1, interval=1, steps=STEPS, schedule="cosine"),
    Cell(stage=3, selector="all", blocks=0, clipping=0.3, accumulation=2, steps=STEPS),
    Cell(stage=3, selector="importance", lora=4, interval=1, bank="device", reward_rate=1e5, steps=STEPS),
    Cell(stage=2, selector="fixed", blocks=(0, -1), offload=True, steps=STEPS),
    Cell(stage=3, bank="cpu", offload=True, weight_decay=0.1, steps=STEPS, schedule="cosine"),
    Cell(stage=2, bank="cpu", dtype="bf16", steps=STEPS),
    Cell(stage=3, bank="discard", dtype="bf16", steps=STEPS),
    Cell(stage=3, bank="cpu", blocks=3, interval=1, clipping=0.3, steps=STEPS),
    Cell(stage=3, bank="cpu", selector="cyclic", blocks=2, interval=2, steps=STEPS),
    Cell(stage=1, selector="fixed", blocks=(1, 3), accumulation=2, steps=STEPS),
]

QUICK = [cell for cell in EXACT if cell.offload and cell.stage == 3 or cell.selector == "importance"]


@pytest.mark.parametrize("cells", [QUICK, pytest.param(EXACT, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_resuming_is_exact(tmp_path: Path, cells: list[Cell]) -> None:
    problems = distributed.run(_exact, cells, tmp_path, ranks=2, deadline=800)[0]
    assert not problems, "\n".join(problems)


def _written(rank: int, cell: Cell, folder: Path) -> dict[str, Tensor]:
    saved(rank, cell, folder, 5)
    return undisturbed(rank, cell)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Cell(stage=3, ranks=2, bank="cpu"), Cell(stage=2, ranks=1, bank="cpu")),
        pytest.param(Cell(stage=2, ranks=1, bank="cpu"), Cell(stage=3, ranks=4, bank="cpu"), marks=pytest.mark.slow),
        pytest.param(Cell(stage=1, ranks=4), Cell(stage=0, ranks=2), marks=pytest.mark.slow),
        pytest.param(
            Cell(stage=0, ranks=2, bank="cpu"),
            Cell(stage=3, ranks=2, bank="cpu", offload=True),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Cell(stage=3, ranks=2, selector="importance", lora=4, interval=1, bank="device"),
            Cell(stage=2, ranks=1, selector="importance", lora=4, interval=1, bank="device"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda cell: f"zero{cell.stage}-{cell.ranks}",
)
def test_other_ranks_and_stages_go_on(tmp_path: Path, first: Cell, second: Cell) -> None:
    first, second = replace(first, steps=STEPS), replace(second, steps=STEPS)
    expected = distributed.run(_written, first, tmp_path, ranks=first.ranks)[0]
    found = distributed.run(resumed, second, tmp_path, ranks=second.ranks)[0]
    assert largest_difference(expected, found) <= TOLERANCE


def _evaluated_late(rank: int, workspace: Path) -> tuple[Any, list[int], list[int]]:
    """Stop after step 2 without an evaluation, resume, and find that step 2 is the best; then save without one."""
    cell = Cell(stage=2, ranks=1, steps=3)
    saved(rank, cell, workspace / "run", 2)
    engine, sparse = start(cell, rank)
    store = Store(workspace / "run")
    checkpoints = Checkpoints(sparse, workspace / "run", keep=1, asynchronous=False)
    checkpoints.resume(store, 2)
    checkpoints.save(2, {})  # nothing is new
    before = store.read(2).state["best"]
    assert checkpoints.is_best(2, 1.5)
    checkpoints.save(2, {})
    best = store.read(2).state["best"]
    for step in (2, 3):
        train_step(cell, engine, step, rank)
        checkpoints.save(step + 1, {})
    assert checkpoints.is_best(4, 1.0)  # in the process that saved the step
    checkpoints.save(4, {})
    assert store.read(4).state["best"] == [1.0, 4] and checkpoints.is_best(5, 0.9) and not checkpoints.is_best(6, 0.95)
    engine.destroy()
    kept = store.steps()
    engine, sparse = start(cell, rank)
    elsewhere = Checkpoints(sparse, workspace / "other", keep=1, asynchronous=False)
    elsewhere.resume(store, 4)
    elsewhere.save(4, {})  # the other folder has no checkpoint yet
    engine.destroy()
    assert before is None
    return best, kept, Store(workspace / "other").steps()


def test_a_step_that_was_saved_before_its_evaluation_can_still_be_the_best(tmp_path: Path) -> None:
    ((best, kept, elsewhere),) = distributed.run(_evaluated_late, tmp_path, ranks=1)
    assert (best, kept, elsewhere) == ([1.5, 2], [4], [4])
