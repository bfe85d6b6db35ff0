"""A parameter that gets no gradient in a step, or in some of its micro-batches, is stepped with nothing old."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from tests import distributed
from tests.engine import parity
from tests.engine.parity import Cell, largest_difference, reference, strata

TOLERANCE = 1e-6


def _left_out(block: int, step: int, micro: int) -> bool:
    """Return whether the MLP of a block takes no part."""
    return {
        1: True,
        2: step % 2 == 1,
        3: step % 3 == 0 and micro == 0,
        4: step % 3 != 0 and micro == 1,
    }.get(block, False)


class _Clock:
    """Tell the models of a process which micro-batch of which step they see."""

    def __init__(self) -> None:
        self.step = self.micro = 0
        self._build, self._batch = parity.build_model, parity.batch

    def batch(self, step: int, micro: int, **workspace: Any) -> Tensor:
        self.step, self.micro = step, micro
        return self._batch(step, micro, **workspace)

    def build_model(self, cell: Cell) -> Any:
        model = self._build(cell)
        layers = model.get_submodule("base_model.model.model.layers" if cell.lora else "model.layers")
        for index, layer in enumerate(layers):
            layer.mlp.forward = self._sometimes(index, layer.mlp.forward)
        return model

    def _sometimes(self, index: int, forward: Any) -> Any:
        return lambda x: x * 0.0 if _left_out(index, self.step, self.micro) else forward(x)


def _differences(rank: int, cells: tuple[Cell, ...]) -> list[str]:
    problems = []
    clock = _Clock()
    with mock.patch.object(parity, "batch", clock.batch), mock.patch.object(parity, "build_model", clock.build_model):
        for cell in cells:
            weights, draws = strata(rank, cell)
            if rank == 0:
                expected, expected_draws = reference(cell)
                difference = largest_difference(weights, expected)
                if draws != expected_draws or not difference <= TOLERANCE:
                    problems.append(f"{cell}: {difference:.2e}")
    return problems


QUICK = (
    Cell(stage=2, offload=True, interval=1, bank="cpu", steps=9, depth=5),
    Cell(stage=3, offload=True, interval=2, accumulation=2, steps=9, depth=5),
)
ALL = tuple(
    Cell(
        stage=stage,
        offload=offload,
        interval=interval,
        accumulation=accumulation,
        bank=bank,
        clipping=0.3,
        steps=9,
        depth=5,
    )
    for stage, offload, interval, accumulation, bank in (
        (1, True, 1, 2, "discard"),
        (1, True, 2, 1, "cpu"),
        (2, True, 2, 2, "cpu"),
        (2, False, 1, 2, "cpu"),
        (3, False, 2, 1, "discard"),
        (3, False, 2, 2, "cpu"),
        (3, True, 1, 1, "cpu"),
        (3, True, 2, 2, "cpu"),
    )
) + (
    Cell(stage=3, selector="all", blocks=0, offload=True, accumulation=2, steps=9, depth=5),
    Cell(stage=2, selector="fixed", blocks=(1, 2, 3, 4), offload=True, accumulation=2, steps=9, depth=5),
    Cell(stage=3, lora=4, offload=True, bank="cpu", accumulation=2, steps=9, depth=5),
    Cell(stage=1, offload=True, accumulation=2, steps=9, depth=5, extra={"zero": {"contiguous_gradients": False}}),
)


@pytest.mark.parametrize("cells", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_what_gets_no_gradient_is_stepped_with_none(cells: tuple[Cell, ...]) -> None:
    assert not distributed.run(_differences, cells, ranks=2, deadline=600)[0]
