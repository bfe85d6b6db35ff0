"""Bank `cpu` copies on streams of its own, and nobody uses what has not arrived."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

import trainer
from tests import distributed
from tests.engine.parity import (
    Cell,
    batch,
    build_model,
    full_weights,
    largest_difference,
    make_engine,
    make_selector,
    reference,
)
from tests.gpu import RANKS
from trainer.engine.banks.cpu import Cpu
from trainer.engine.zero.slices import Slice

pytestmark = pytest.mark.gpu

# Of the device's clock, 1 to 2 GHz: long against a forward, and long against a copy.
SLOW_IN, SLOW_OUT = 10**9, 10**7


class SlowBank(Cpu):
    """Copies as of large blocks. They are issued while the slices are iterated over, on the stream that copies."""

    def __init__(self) -> None:
        super().__init__()
        self.arrivals: list[torch.cuda.Event] = []

    def put(self, slices: Sequence[Slice]) -> None:
        super().put(self._slowly(slices, SLOW_OUT))  # type: ignore[arg-type]

    def take(self, slices: Sequence[Slice]) -> None:
        self.arrivals.append(torch.cuda.Event())
        super().take(self._slowly(slices, SLOW_IN, self.arrivals[-1]))  # type: ignore[arg-type]

    @staticmethod
    def _slowly(slices: Sequence[Slice], cycles: int, done: torch.cuda.Event | None = None) -> Iterator[Slice]:
        torch.cuda._sleep(cycles)
        yield from slices
        if done is not None:
            done.record()


def _overlapped(rank: int, cells: list[Cell]) -> list[tuple[list[bool], float]]:
    """By cell: for each return, whether forward was over before anything had arrived; and how far weights are off."""
    torch.set_float32_matmul_precision("highest")
    found = []
    for cell in cells:
        bank = SlowBank()
        model = build_model(cell)
        sparse = trainer.prepare(model, selector=make_selector(cell), bank=bank)
        engine = make_engine(cell, model, sparse)
        sparse.attach(engine, guard_every=0)  # whose samples of masters wait for the copies
        beside = []
        for step in range(cell.steps):
            bank.arrivals.clear()
            ids = batch(step, 0, ranks=cell.ranks, rank=rank)
            loss = engine(input_ids=ids, labels=ids).loss
            loss.item()
            if bank.arrivals:
                beside.append(not any(arrival.query() for arrival in bank.arrivals))
            engine.backward(loss)
            engine.step()
        found.append((beside, largest_difference(full_weights(engine), reference(cell)[0])))
        engine.destroy()
    return found


def test_blocks_come_back_beside_the_forward_and_are_there_for_the_step() -> None:
    cells = [
        Cell(stage=stage, ranks=RANKS, selector="cyclic", blocks=1, interval=1, steps=14, bank="cpu")
        for stage in (2, 3)
    ]
    for found in distributed.run(_overlapped, cells, ranks=RANKS, accelerator="cuda"):
        for beside, difference in found:
            # Earlier ones may wait for page-locked memory, which is allocated until every block has been away.
            assert len(beside) > 3 and all(beside[-3:])
            assert difference <= 1e-5
