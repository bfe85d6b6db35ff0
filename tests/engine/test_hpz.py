"""hpZ (`zero_hpz_partition_size`): a second copy of the weights on each machine, which switches must not outdate."""

from __future__ import annotations

import pytest

from tests import distributed
from tests.engine.parity import Cell, largest_difference, reference, strata

CELL = Cell(
    ranks=4,
    interval=2,
    steps=10,
    bank="cpu",
    weight_decay=0.1,
    evaluate=True,
    extra={"zero": {"zero_hpz_partition_size": 2}},
)


@pytest.mark.slow
def test_two_machines_of_two_ranks_train_as_one() -> None:
    # DeepSpeed makes hpZ's groups once per process: one cell.
    weights, draws = distributed.run(strata, CELL, ranks=4, deadline=240)[0]
    expected, expected_draws = reference(CELL)
    assert draws == expected_draws
    assert largest_difference(weights, expected) <= 1e-6
