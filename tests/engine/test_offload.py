"""Weights in host memory and optimizer state on NVMe: the same numbers, flat memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder

from tests import distributed
from tests.engine.parity import Cell, largest_difference, reference, strata
from tests.engine.test_switching import _registration, start, train_step
from trainer.engine.registration import RegistrationError

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


def nvme(folder: Path) -> dict[str, Any]:
    return {"zero": {"offload_optimizer": {"device": "nvme", "nvme_path": str(folder)}}}


needs_aio = pytest.mark.skipif(
    not AsyncIOBuilder().is_compatible(), reason="DeepSpeed's NVMe offload needs libaio and its headers (libaio-dev)"
)


@pytest.mark.slow
@needs_aio
@pytest.mark.timeout(600)
def test_optimizer_state_on_nvme(tmp_path: Path) -> None:
    """Blocks of a megabyte of master on each rank: DeepSpeed keeps smaller ones in memory."""
    cells = [
        Cell(extra=nvme(tmp_path / "a"), offload=True, hidden=256, steps=14),
        Cell(extra=nvme(tmp_path / "b"), offload=True, hidden=256, steps=14, bank="cpu", weight_decay=0.1),
    ]
    assert max(distributed.run(_parity, cells, ranks=2, deadline=500)[0]) <= TOLERANCE
    assert any(file.stat().st_size > 2**20 for file in (tmp_path / "a").rglob("*.swp"))


@pytest.mark.slow
@needs_aio
@pytest.mark.timeout(600)
def test_memory_is_flat_with_optimizer_state_on_nvme(tmp_path: Path) -> None:
    cell = Cell(extra=nvme(tmp_path), offload=True, hidden=256, interval=1, steps=14, bank="cpu")
    for problems in distributed.run(_registration, (cell,), ranks=2, deadline=500):
        assert not problems


def _uneven(rank: int, folder: Path) -> None:
    import tests.engine.test_switching as switching
    from tests.engine import parity

    cell = Cell(extra=nvme(folder), offload=True, interval=1)
    parity.build_model = switching.build_model = lambda cell: switching._uneven_model()
    engine, _ = start(cell)
    with pytest.raises(RegistrationError, match="blocks differ in shape"):
        for step in range(3):
            train_step(cell, engine, step, rank)


@pytest.mark.slow
@needs_aio
def test_blocks_of_different_shapes_do_not_fit_into_one_file(tmp_path: Path) -> None:
    distributed.run(_uneven, tmp_path, ranks=1)
