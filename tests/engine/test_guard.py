"""The guard stops all ranks if something else trains than what was drawn."""

from __future__ import annotations

import pytest

import trainer
from tests import distributed
from tests.engine.parity import Cell, build_model, make_engine, train_step
from trainer.selectors import Uniform


def _guarded(rank: int, kind: str) -> str:
    from trainer.engine.guard import GuardError

    cell = Cell(stage=3 if kind == "unfrozen" else 2, interval=2)
    model = build_model(cell)
    seed = 7 + (rank if kind == "ranks" else 0)
    sparse = trainer.prepare(model, selector=Uniform(blocks=2, interval=2, seed=7))
    engine = make_engine(cell, model, sparse)
    sparse.attach(engine, guard_every=1)
    sparse.selector = Uniform(blocks=2, interval=2, seed=seed)
    try:
        for step in range(6):
            train_step(cell, engine, step, rank)
            frozen = next(b for b in sparse.blocks if b.index not in sparse.active)
            if kind == "moved" and rank == 1 and step == 2:
                next(p for n, p in frozen.parameters.items() if "gate" in n).data.add_(1.0)
            if kind == "still" and step == 1:
                engine.basic_optimizer.step = lambda *args, **kwargs: None
            if kind == "unfrozen" and step == 3:
                sparse.blocks[sparse.active[0]].module.requires_grad_(False)
                sparse.selector.select = lambda interval, n, same=sparse.active: same
    except GuardError as error:
        return str(error)
    finally:
        engine.destroy()
    return "nothing"


def _all_kinds(rank: int) -> dict[str, str]:
    return {kind: _guarded(rank, kind) for kind in ("ranks", "moved", "still", "unfrozen")}


@pytest.fixture(scope="module")
def answers() -> list[dict[str, str]]:
    """Return what the guard says on each rank, by what is wrong."""
    return distributed.run(_all_kinds, ranks=2, deadline=120)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("ranks", ["rank 0: interval 1, active blocks", "rank 1: interval 1, active blocks"]),
        ("moved", ["rank 1", "is frozen but its weights moved"]),
        ("still", ["were active but none of their sampled master weights moved"]),
        ("unfrozen", ["does not require gradients"]),
    ],
)
def test_the_guard_stops_all_ranks_at_once(answers: list[dict[str, str]], kind: str, words: list[str]) -> None:
    first, second = (of_rank[kind] for of_rank in answers)
    for word in words:
        assert word in first
    assert first == second
