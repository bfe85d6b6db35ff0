"""Blocks whose parameters differ in shape and number can take each other's slot."""

from __future__ import annotations

import pytest

from tests import distributed
from tests.engine.parity import Cell, largest_difference, reference, strata
from tests.engine.switching import uneven_model


def _uneven(rank: int, cells: tuple[Cell, ...]) -> list[float]:
    import tests.engine.parity as parity

    parity.build_model = lambda cell: uneven_model()
    differences = []
    for cell in cells:
        weights, _ = strata(rank, cell)
        differences.append(largest_difference(weights, reference(cell)[0]))
    return differences


@pytest.mark.slow
def test_blocks_of_different_shapes() -> None:
    cells = tuple(
        Cell(stage=stage, bank=bank, accumulation=2, offload=offload, interval=1, steps=8, weight_decay=0.1)
        for stage, bank, offload in (
            (1, "discard", False),
            (2, "cpu", False),
            (2, "cpu", True),
            (3, "cpu", False),
            (3, "cpu", True),
        )
    )
    for differences in distributed.run(_uneven, cells, ranks=2):
        assert max(differences) <= 1e-6, differences
