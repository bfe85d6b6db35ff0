"""A sparse update rule moves only the weights that it chose, the same on every rank and ZeRO stage."""

from __future__ import annotations

import torch
from torch import Tensor

from tests import distributed
from tests.engine.parity import Cell, full_weights, largest_difference, train_step
from tests.engine.switching import TopGradientEntries, start


def _sparse_rule(rank: int, stages: tuple[int, ...]) -> list[dict[str, Tensor]]:
    results = []
    for stage in stages:
        cell = Cell(stage=stage, steps=6, interval=2, accumulation=2)
        engine, sparse = start(cell, update=TopGradientEntries(k=5))
        before = full_weights(engine)
        counts = []
        for step in range(cell.steps):
            train_step(cell, engine, step, rank)
            after = full_weights(engine)
            counts.append(
                {
                    n: int((before[n] != after[n]).sum())
                    for b in sparse.blocks
                    for n in b.parameters
                    if b.index in sparse.active
                }
            )
            frozen = [n for b in sparse.blocks for n in b.parameters if b.index not in sparse.active]
            assert all(torch.equal(before[n], after[n]) for n in frozen)
            before = after
        for count in counts:
            assert all(n == 10 for name, n in count.items() if "proj" in name), count  # k on each of two ranks
            assert all(n == 32 for name, n in count.items() if "layernorm" in name), count
        results.append(before)
        engine.destroy()
    return results


def test_a_sparse_update_rule_moves_only_what_it_chose() -> None:
    results, others = distributed.run(_sparse_rule, (0, 2, 3), ranks=2)
    for a, b in zip(results, others, strict=True):
        assert largest_difference(a, b) == 0.0  # replicas agree
    assert largest_difference(results[0], results[1]) <= 1e-6
    assert largest_difference(results[0], results[2]) <= 1e-6
