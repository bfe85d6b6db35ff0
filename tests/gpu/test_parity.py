"""fp32 training on GPUs equals the plain loop, with communication on streams beside the computation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import distributed
from tests.engine.parity import Cell, largest_difference, reference, strata
from tests.gpu import RANKS

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-5
PINNED = {"device": "cpu", "pin_memory": True}

ON_DEVICE = [
    Cell(stage=0),
    Cell(stage=1, bank="cpu", weight_decay=0.1),
    Cell(stage=2, bank="cpu", accumulation=2, clipping=0.3, schedule="cosine"),
    Cell(stage=2, evaluate=True, interval=1, steps=8),
    Cell(stage=3, bank="cpu", accumulation=2, clipping=0.3, schedule="cosine"),
    Cell(stage=3, evaluate=True, interval=1, steps=8),
    Cell(stage=3, bank="cpu", checkpointing=True, always_on=("norm",)),
    Cell(stage=3, bank="device", lora=4, weight_decay=0.1),
]
OFFLOADED = [
    Cell(stage=2, offload=True, bank="cpu", extra={"zero": {"offload_optimizer": PINNED}}),
    Cell(stage=3, offload=True, bank="cpu", extra={"zero": {"offload_optimizer": PINNED}}),
    Cell(stage=3, evaluate=True, interval=1, steps=8, extra={"zero": {"offload_param": PINNED}}),
]


def _differences(rank: int, cells: list[Cell]) -> list[tuple[float, bool]]:
    """By cell: how far weights are from the reference, and whether the same blocks were drawn."""
    torch.set_float32_matmul_precision("highest")  # no TF32
    found = []
    for cell in cells:
        weights, draws = strata(rank, cell)
        expected, expected_draws = reference(cell)
        found.append((largest_difference(weights, expected), draws == expected_draws))
    return found


def overlapping(cell: Cell) -> Cell:
    zero: dict[str, Any] = {"overlap_comm": True} | cell.extra.get("zero", {})
    return replace(cell, ranks=RANKS, extra=cell.extra | {"zero": zero})


@pytest.mark.parametrize("cells", [ON_DEVICE, OFFLOADED], ids=["on device", "offloaded"])
def test_numbers_equal_the_plain_loop(cells: list[Cell]) -> None:
    for found in distributed.run(_differences, [overlapping(cell) for cell in cells], ranks=RANKS, accelerator="cuda"):
        for cell, (difference, same_draws) in zip(cells, found, strict=True):
            assert same_draws and difference <= TOLERANCE, (str(cell), difference)
