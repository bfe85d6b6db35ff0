"""Memory is the same after every switch, and the optimizer and its groups keep number and identity."""

from __future__ import annotations

from typing import Any

from tests import distributed
from tests.engine.parity import Cell
from tests.engine.switching import memory_problems


def test_memory_is_flat_and_groups_keep_number_and_identity() -> None:
    settings: tuple[dict[str, Any], ...] = (
        {"stage": 2},
        {"stage": 3},
        {"stage": 2, "offload": True},
        {"stage": 3, "offload": True, "extra": {"zero": {"offload_param": {"device": "cpu"}}}},
    )
    cells = tuple(Cell(interval=1, steps=12, depth=6, bank="cpu", **changed) for changed in settings)
    for problems in distributed.run(memory_problems, cells, ranks=2):
        assert not problems
