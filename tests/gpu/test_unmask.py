"""ID3 on GPUs: as the dense one, and what a step holds there."""

from __future__ import annotations

import pytest
import torch

from tests import distributed
from tests.engine.dense_id3 import Case, cases, compared, start
from tests.engine.parity import Cell, batch
from tests.gpu import RANKS
from trainer.updates import Unmask

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-5


def _all_cases(rank: int) -> list[str]:
    torch.set_float32_matmul_precision("highest")  # no TF32
    found = []
    for case in cases(RANKS, every=True):
        found += compared(rank, case, tolerance=TOLERANCE)
    return found


def test_masks_and_weights_are_those_of_dense_id3() -> None:
    for problems in distributed.run(_all_cases, ranks=RANKS, accelerator="cuda"):
        assert not problems


def _peaks(rank: int, hidden: int) -> tuple[int, list[int], int]:
    """Bytes of the model's weights, the most that each step takes on top of what was there before it, and what is there
    after the last over the weights."""
    cell = Cell(selector="all", stage=2, ranks=RANKS, steps=6, hidden=hidden, dtype="bf16")
    engine, sparse = start(Case(cell, budget=1000, steps=3))
    assert isinstance(sparse.update, Unmask)
    weights = sum(p.numel() * p.element_size() for p in engine.module.parameters())
    peaks = []
    for step in range(cell.steps):
        ids = batch(step, 0, ranks=cell.ranks, rank=rank)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    held = torch.cuda.memory_allocated() - weights
    engine.destroy()
    return weights, peaks, held


def test_dense_gradients_never_gather() -> None:
    """The allocator never holds more than a few tensors' gradients and scores, and none of them between steps."""
    for weights, peaks, held in distributed.run(_peaks, 2048, ranks=RANKS, accelerator="cuda"):
        # Scores of everything in fp32 would be twice the weights, dense gradients as much as the weights.
        assert max(peaks) < 0.7 * weights and max(peaks[3:]) < 0.4 * weights, (weights, peaks)
        assert held < 0.25 * weights, (weights, held)
