"""hpZ (`zero_hpz_partition_size`): a second copy of the weights on each machine, which nothing may leave outdated.

Two ranks stand for one machine with a copy; DeepSpeed makes hpZ's groups once per process, so each run is one engine.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import distributed
from tests.checkpoint.test_resume import undisturbed
from tests.engine.dense_id3 import Case, compared
from tests.engine.parity import (
    Cell,
    batch,
    build_model,
    full_weights,
    largest_difference,
    reference,
    start,
    strata,
    train_step,
)
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.store import Store

HPZ = {"zero": {"zero_hpz_partition_size": 2}}
CELL = Cell(ranks=4, interval=2, bank="cpu", weight_decay=0.1, evaluate=True, extra=HPZ)
TWO = Cell(interval=2, bank="cpu", extra=HPZ)
# Parameters stay gathered between steps, and an evaluation leaves prefetched ones in flight.
EAGER = {
    "zero": HPZ["zero"]
    | {"stage3_prefetch_bucket_size": 100_000, "stage3_max_live_parameters": 10**6, "stage3_max_reuse_distance": 10**6}
}


@pytest.mark.slow
def test_two_machines_of_two_ranks_train_as_one() -> None:
    weights, draws = distributed.run(strata, CELL, ranks=4, deadline=240)[0]
    expected, expected_draws = reference(CELL)
    assert draws == expected_draws
    assert largest_difference(weights, expected) <= 1e-6


@torch.no_grad()
def _evaluated(engine: Any, rank: int, *, times: int = 1) -> float:
    engine.eval()
    ids = batch(99, 0, ranks=2, rank=rank)
    losses = [float(engine(input_ids=ids, labels=ids).loss) for _ in range(times)]
    engine.train()
    return losses[-1]


def _finished(cell: Cell, engine: Any, rank: int, step: int) -> dict[str, Tensor]:
    for later in range(step, cell.steps):
        train_step(cell, engine, later, rank)
    return full_weights(engine)


def _saved(rank: int, cell: Cell, folder: Path) -> float:
    engine, sparse = start(cell, rank)
    checkpoints = Checkpoints(sparse, folder, keep=2, asynchronous=False)
    for step in range(5):
        train_step(cell, engine, step, rank)
    checkpoints.save(5, {})
    return _evaluated(engine, rank)


def _resumed_after_forwards(rank: int, cell: Cell, folder: Path) -> tuple[float, float, dict[str, Tensor]]:
    """Return the loss of the base and of the checkpoint, and the weights at the end."""
    engine, sparse = start(cell, rank)
    checkpoints = Checkpoints(sparse, folder, keep=2, asynchronous=False)
    before = _evaluated(engine, rank, times=3)
    (step,) = Store(folder).steps()
    checkpoints.resume(Store(folder), step)
    return before, _evaluated(engine, rank), _finished(cell, engine, rank, step)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [
        TWO,
        replace(TWO, extra=EAGER, bank="discard"),
        replace(TWO, lora=4, bank="device"),
        replace(TWO, offload=True, dtype="bf16"),
    ],
    ids=["cpu", "eager", "lora", "offload"],
)
def test_a_run_that_is_resumed_after_a_forward_trains_the_weights_of_the_checkpoint(tmp_path: Path, cell: Cell) -> None:
    expected = distributed.run(undisturbed, cell, ranks=2)[0]
    del expected["drawn"]
    at_save = distributed.run(_saved, cell, tmp_path, ranks=2)[0]
    base, evaluated, weights = distributed.run(_resumed_after_forwards, cell, tmp_path, ranks=2)[0]
    assert base != at_save and evaluated == at_save
    assert largest_difference(weights, expected) == 0.0


def _loaded_into_a_used_engine(rank: int, cell: Cell, folder: Path) -> tuple[float, float, list[dict[str, Tensor]]]:
    """Return the loss at the checkpoint when it was saved and when it is loaded, and both runs' final weights."""
    engine, _ = start(cell, rank)
    for step in range(5):
        train_step(cell, engine, step, rank)
    engine.save_checkpoint(folder)
    at_save = _evaluated(engine, rank)
    first = _finished(cell, engine, rank, 5)
    _evaluated(engine, rank, times=2)
    engine.load_checkpoint(folder)
    return at_save, _evaluated(engine, rank), [first, _finished(cell, engine, rank, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("extra", [HPZ, EAGER], ids=["released", "eager"])
def test_a_checkpoint_loaded_into_a_used_engine_is_what_trains(tmp_path: Path, extra: dict[str, Any]) -> None:
    cell = replace(TWO, extra=extra)
    at_save, loaded, (first, second) = distributed.run(_loaded_into_a_used_engine, cell, tmp_path, ranks=2)[0]
    assert loaded == at_save
    assert largest_difference(first, second) == 0.0


ID3 = Cell(selector="all", steps=7, extra=HPZ)
EVERYTHING = sum(p.numel() for p in build_model(ID3).parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        # All weights from the first step on, norms too, which stay gathered.
        Case(replace(ID3, weight_decay=0.1, accumulation=2, clipping=0.05, schedule="cosine"), EVERYTHING, steps=1),
        Case(replace(ID3, selector="uniform", bank="device", steps=10, extra=EAGER), bias_correction="local"),
        Case(replace(ID3, lora=4), budget=77),
    ],
    ids=["all", "uniform", "lora"],
)
def test_id3_scores_the_weights_of_the_last_step(case: Case) -> None:
    for problems in distributed.run(compared, case, ranks=2):
        assert not problems
