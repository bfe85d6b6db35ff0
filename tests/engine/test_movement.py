"""Active blocks move at every step; frozen ones do not move by a bit."""

from __future__ import annotations

import torch

from tests import distributed
from tests.engine.parity import Cell, full_weights, make_selector, train_step
from tests.engine.switching import start


def _movement(rank: int, stages: tuple[int, ...]) -> list[str]:
    problems = []
    for stage in stages:
        cell = Cell(stage=stage, weight_decay=0.1, interval=3, steps=9, bank="cpu")
        engine, sparse = start(cell)
        for step in range(cell.steps):
            before = full_weights(engine)
            train_step(cell, engine, step, rank)
            after = full_weights(engine)
            for block in sparse.blocks:
                moved = [not torch.equal(before[n], after[n]) for n in block.parameters]
                wanted = block.index in sparse.active
                if any(moved) if not wanted else not all(moved):
                    problems.append(f"stage {stage} step {step}: block {block.index} active={wanted} moved={moved}")
            for parameters in sparse.always_on.values():
                if not all(not torch.equal(before[n], after[n]) for n in parameters):
                    problems.append(f"stage {stage} step {step}: {list(parameters)} did not move")
        if sparse.times_active != _draws(cell):
            problems.append(f"times active {sparse.times_active}")
        engine.destroy()
    return problems


def _draws(cell: Cell) -> list[int]:
    selector = make_selector(cell)
    times = [0] * cell.depth
    for step in range(cell.steps):
        for index in selector.select(step // cell.interval, cell.depth):
            times[index] += 1
    return times


def test_active_blocks_move_every_step_and_frozen_ones_not_by_a_bit() -> None:
    for problems in distributed.run(_movement, (0, 1, 2, 3), ranks=2):
        assert not problems
