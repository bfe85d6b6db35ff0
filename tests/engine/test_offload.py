"""Weights in host memory and optimizer state on NVMe: the same numbers, flat memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

from tests import distributed
from tests.engine import parity
from tests.engine.parity import Cell, largest_difference, reference, strata, train_step
from tests.engine.switching import memory_problems, start
from trainer.engine.zero.errors import RegistrationError

TOLERANCE = 1e-6


def _parity(rank: int, cells: list[Cell]) -> list[float]:
    found = []
    for cell in cells:
        weights, _ = strata(rank, cell)
        found.append(largest_difference(weights, reference(cell)[0]) if rank == 0 else 0.0)
    return found


@pytest.mark.slow
def test_parameters_in_host_memory() -> None:
    offload = {"zero": {"offload_param": {"device": "cpu"}}}
    cells = [
        Cell(extra=offload, weight_decay=0.1),
        Cell(extra=offload, offload=True, bank="cpu", accumulation=2),
        Cell(extra=offload, offload=True, evaluate=True, interval=1, steps=8),
    ]
    assert max(distributed.run(_parity, cells, ranks=2)[0]) <= TOLERANCE


def _away_and_back(rank: int, cells: list[Cell]) -> list[list[str]]:
    """Return the names of weights that differ at the end of a run whose state was away between its micro-batches."""
    problems = []
    for cell in cells:
        weights: list[dict[str, torch.Tensor]] = []
        for moves in (False, True):
            engine, _ = parity.start(cell, rank)
            kinds = [None, *([kind] for kind in OffloadStateTypeEnum)]
            for step in range(cell.steps):
                for micro in range(cell.accumulation):
                    if moves:
                        engine.offload_states(include=kinds[step % len(kinds)], pin_memory=step % 2 == 0)
                        engine.reload_states()
                        assert not engine.optimizer.offloaded_states
                    ids = parity.batch(step, micro, ranks=cell.ranks, rank=rank)
                    engine.backward(engine(input_ids=ids, labels=ids).loss)
                    if moves and cell.stage == 3:  # with gradients that are averaged, and not applied
                        engine.offload_states(pin_memory=False)
                        engine.reload_states(non_blocking=True)
                    engine.step()
            weights.append(parity.full_weights(engine))
            engine.destroy()
        without, with_moves = weights
        problems.append([name for name in without if not torch.equal(without[name], with_moves[name])])
    return problems


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_states_that_deepspeed_moves_to_the_host_and_back_train_the_same_to_the_bit(ranks: int) -> None:
    """`engine.offload_states` and `engine.reload_states`, before, between and after switches."""
    cells = [
        Cell(ranks=ranks, bank="cpu", accumulation=2, weight_decay=0.1, steps=9, clipping=0.5),
        Cell(ranks=ranks, dtype="bf16", steps=7, family="qwen3_moe", interval=1),
        Cell(ranks=ranks, stage=2, bank="cpu", steps=7),
    ]
    for problems in distributed.run(_away_and_back, cells, ranks=ranks):
        assert problems == [[] for _ in cells]


def nvme(folder: Path) -> dict[str, Any]:
    return {"zero": {"offload_optimizer": {"device": "nvme", "nvme_path": str(folder)}}}


needs_aio = pytest.mark.skipif(
    not AsyncIOBuilder().is_compatible(), reason="DeepSpeed's NVMe offload needs libaio and its headers (libaio-dev)"
)


@pytest.mark.slow
@needs_aio
@pytest.mark.timeout(600)
def test_optimizer_state_on_nvme(tmp_path: Path) -> None:
    """Use blocks of a megabyte of master on each rank: DeepSpeed keeps smaller ones in memory."""
    cells = [
        Cell(extra=nvme(tmp_path / "a"), offload=True, hidden=256, steps=14),
        Cell(extra=nvme(tmp_path / "b"), offload=True, hidden=256, steps=14, bank="cpu", weight_decay=0.1),
    ]
    assert max(distributed.run(_parity, cells, ranks=2, deadline=800)[0]) <= TOLERANCE
    assert any(file.stat().st_size > 2**20 for file in (tmp_path / "a").rglob("*.swp"))


@pytest.mark.slow
@needs_aio
@pytest.mark.timeout(600)
def test_memory_is_flat_with_optimizer_state_on_nvme(tmp_path: Path) -> None:
    cell = Cell(extra=nvme(tmp_path), offload=True, hidden=256, interval=1, steps=14, bank="cpu")
    for problems in distributed.run(memory_problems, (cell,), ranks=2, deadline=500):
        assert not problems


def _uneven(rank: int, folder: Path) -> None:
    from tests.engine import parity, switching

    cell = Cell(extra=nvme(folder), offload=True, interval=1)
    parity.build_model = switching.build_model = lambda cell: switching.uneven_model()
    engine, _ = start(cell)
    with pytest.raises(RegistrationError, match="blocks differ in shape"):
        for step in range(3):
            train_step(cell, engine, step, rank)


@pytest.mark.slow
@needs_aio
def test_blocks_of_different_shapes_do_not_fit_into_one_file(tmp_path: Path) -> None:
    distributed.run(_uneven, tmp_path, ranks=1)
