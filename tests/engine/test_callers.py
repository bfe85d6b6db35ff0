"""Switches follow the engine's forward in training mode, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests import distributed
from tests.engine.parity import Cell, batch
from tests.engine.switching import start
from trainer.selectors import Cyclic


def _callers(rank: int) -> tuple[list[tuple[int, ...]], tuple[int, ...], list[str]]:
    cell = Cell(stage=2, interval=2)
    engine, sparse = start(cell, selector=Cyclic(blocks=1, interval=2, order="ascending"))
    sets, refused = [], []

    def train(forward: Any) -> None:
        engine.backward(forward(input_ids=ids, labels=ids).loss)
        engine.step()

    for step in range(4):
        ids = batch(step, 0, ranks=cell.ranks, rank=rank)
        train(engine.forward)
        sets.append(sparse.active)
    engine.eval()
    engine(input_ids=ids)  # with gradients, at the border of an interval
    evaluated = sparse.active
    for forward in (engine, engine.module):  # in evaluation mode, and past the engine
        with pytest.raises(RuntimeError, match="no switch has happened") as error:
            train(forward)
        refused.append(str(error.value))
        engine.train()
    return sets, evaluated, refused


def test_switches_follow_the_engine_s_forward_in_training_mode_and_nothing_else() -> None:
    (sets, evaluated, refused), _ = distributed.run(_callers, ranks=2)
    assert sets == [(0,), (0,), (1,), (1,)]
    assert evaluated == (1,)
    assert all("step 4 begins interval 2" in text and "engine.train()" in text for text in refused)
