"""A step that is skipped for overflow does not count towards the interval."""

from __future__ import annotations

from tests import distributed
from tests.engine.parity import Cell, batch, make_selector
from tests.engine.switching import start


def _skipped(rank: int) -> tuple[list[tuple[int, ...]], list[bool], int]:
    cell = Cell(stage=2, dtype="bf16", interval=2)
    engine, sparse = start(cell)
    sets, applied = [], []
    for step in range(5):
        ids = batch(step, 0, ranks=2, rank=rank)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss * (float("inf") if step == 1 else 1.0))
        engine.step()
        applied.append(engine.was_step_applied())
        sets.append(sparse.active)
    return sets, applied, sparse.steps


def test_a_skipped_step_does_not_count_towards_the_interval() -> None:
    (sets, applied, steps), _ = distributed.run(_skipped, ranks=2)
    assert applied == [True, False, True, True, True] and steps == 4
    selector = make_selector(Cell(interval=2))
    first, second = selector.select(0, 4), selector.select(1, 4)
    assert sets == [first, first, first, second, second]
