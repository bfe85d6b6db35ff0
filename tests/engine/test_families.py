"""Every family of decoder models trains as in a plain loop."""

from __future__ import annotations

from dataclasses import replace

from tests import distributed
from tests.engine.parity import Cell, largest_difference, reference, strata
from tests.models import FAMILIES

TOLERANCE = 1e-6


def _families(rank: int, families: tuple[str, ...]) -> dict[str, float]:
    """The largest difference of any weight from the plain loop, by family and stage, after two switches."""
    differences = {}
    for family in families:
        cell = Cell(family=family, steps=6, weight_decay=0.1)
        expected = reference(cell)[0] if rank == 0 else {}
        for stage in (2, 3):
            weights, _ = strata(rank, replace(cell, stage=stage))
            if rank == 0:
                differences[f"{family}, stage {stage}"] = largest_difference(weights, expected)
    return differences


def test_every_family_trains_as_in_a_plain_loop() -> None:
    differences = distributed.run(_families, tuple(FAMILIES), ranks=2, deadline=400)[0]
    assert len(differences) == 2 * len(FAMILIES)
    wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
    assert not wrong, wrong
