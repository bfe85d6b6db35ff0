"""Bytes by formula equal bytes by measurement."""

from __future__ import annotations

import pytest

import trainer
from tests import distributed
from tests.engine.parity import Cell, build_model, make_engine, make_selector, train_step
from trainer.accounting import ModelState, measured_state, model_state, readable
from trainer.blocks import full_numel


def test_the_table_of_the_design_by_hand() -> None:
    parameters, groups = [1000, 300, 50], [[300], [50]]
    assert model_state(parameters, groups, stage=2, ranks=2, weight_bytes=2) == ModelState(2700, 0, 700, 1400)
    assert model_state(parameters, groups, stage=3, ranks=2, weight_bytes=2) == ModelState(1350, 350, 700, 1400)
    assert model_state(parameters, groups, stage=3, ranks=2, weight_bytes=4) == ModelState(2700, 700, 0, 1400)
    assert model_state(parameters, groups, stage=0, ranks=2, weight_bytes=4) == ModelState(5400, 0, 0, 2800)
    offloaded = model_state(parameters, groups, stage=2, ranks=2, weight_bytes=2, offload=True)
    assert (offloaded.device, offloaded.host) == (2700, 700 + 700 + 1400)


@pytest.mark.parametrize(("size", "text"), [(5, "5 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**41, "2.0 TiB")])
def test_readable(size: int, text: str) -> None:
    assert readable(size) == text


def _measure(rank: int, cells: list[Cell]) -> list[tuple[str, int, int]]:
    figures = []
    for cell in cells:
        model = build_model(cell)
        sparse = trainer.prepare(model, selector=make_selector(cell), bank=cell.bank)
        engine = make_engine(cell, model, sparse)
        sparse.attach(engine)
        for step in range(3):
            train_step(cell, engine, step, rank)
        expected = model_state(
            [full_numel(p) for p in model.parameters()],
            [[full_numel(p) for p in group.values()] for group in sparse.groups()],
            stage=cell.stage,
            ranks=cell.ranks,
            weight_bytes=2 if cell.dtype == "bf16" else 4,
            offload=cell.offload,
        )
        figures.append((str(cell), measured_state(sparse.held(), offload=cell.offload).total, expected.total))
        engine.destroy()
    return figures


def test_measured_state_is_the_minimum() -> None:
    cells = [
        Cell(stage=stage, dtype=dtype, offload=offload, bank="cpu", steps=4)
        for stage in (0, 1, 2, 3)
        for dtype in ("fp32", "bf16")
        for offload in (False, True)
        if stage or (dtype == "fp32" and not offload)
    ]
    for figures in distributed.run(_measure, cells, ranks=2):
        for cell, measured, minimum in figures:
            assert minimum <= measured <= 1.05 * minimum, (cell, measured, minimum)
