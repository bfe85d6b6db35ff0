"""Bytes by formula equal bytes by measurement."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import trainer
from tests import distributed
from tests.engine.parity import Cell, build_model, make_engine, make_selector, train_step
from tests.models import tiny_model
from trainer.accounting import (
    BlockFlops,
    ModelState,
    dense_gradient_bytes,
    measured_state,
    model_state,
    readable,
    step_flops,
)
from trainer.model.blocks import find, full_numel
from trainer.planner.passes import step_parts
from trainer.selectors import Fixed
from trainer.updates import Dense, Footprint, Transient, Unmask, UpdateRule


def test_the_table_of_the_design_by_hand() -> None:
    parameters, groups = [1000, 300, 50], [[300], [50]]
    assert model_state(parameters, groups, stage=2, ranks=2, weight_bytes=2) == ModelState(2700, 0, 700, 1400)
    assert model_state(parameters, groups, stage=3, ranks=2, weight_bytes=2) == ModelState(1350, 350, 700, 1400)
    assert model_state(parameters, groups, stage=3, ranks=2, weight_bytes=4) == ModelState(2700, 700, 0, 1400)
    assert model_state(parameters, groups, stage=0, ranks=2, weight_bytes=4) == ModelState(5400, 0, 0, 2800)
    offloaded = model_state(parameters, groups, stage=2, ranks=2, weight_bytes=2, offload=True)
    assert (offloaded.device, offloaded.host) == (2700, 700 + 700 + 1400)


def test_the_state_of_id3_by_hand() -> None:
    parameters = [1001, 300]
    rule = Unmask(budget=50, growth_steps=7)  # 8 weights in the first step
    found = rule.footprint(parameters, [], ranks=2, weight_bytes=2, accumulation=2)
    gradient = Transient("dense gradient", (2 + 4) * 1001 + 4 * 501, ", of one parameter at a time")
    growing = " of the first 7 steps, in which the mask grows"
    sums = Transient("sums", 4 * 651, f"{growing}: all gradients, over micro-batches; none without accumulation")
    assert found == Footprint(
        trained=50,
        gradients=4 * 50,
        masters=4 * 25,
        moments=8 * 25,
        indices=8 * 50,
        backward=(gradient, Transient("candidates", 20 * 8, growing), sums),
        saved=24 * 50,
    )
    local = Unmask(budget=50, growth_steps=7, bias_correction="local")
    counted = local.footprint(parameters, [], ranks=2, weight_bytes=2, accumulation=1)
    assert (counted.moments, counted.saved, len(counted.backward)) == (12 * 25, 28 * 50, 2)
    assert dense_gradient_bytes(1001, ranks=2, weight_bytes=2) == (2 + 4) * 1001 + 4 * 501
    assert dense_gradient_bytes(1001, ranks=1, weight_bytes=2) == (2 + 4) * 1001
    assert dense_gradient_bytes(1001, ranks=1, weight_bytes=4) == 4 * 1001


def test_the_footprint_of_a_rule_that_says_nothing_of_its_own() -> None:
    assert Dense().footprint([], [], ranks=2, weight_bytes=2, accumulation=1) == Footprint()
    found = UpdateRule.footprint(Dense(), [101, 50], [20], ranks=2, weight_bytes=2, accumulation=1)
    assert (found.trained, found.masters, found.moments, found.kept) == (151, 4 * 76, 8 * 76, 12 * 10)
    assert found.saved == 24 * (151 + 20) and sum(part.size for part in found.backward) == 6 * 101 + 4 * 51 + 4 * 76


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


# --- FLOPs -------------------------------------------------------------------------------------------------------


def test_flops_by_hand() -> None:
    """Two blocks, of which one trains or both do, and a head."""
    blocks = [BlockFlops(10, passed=7, active=20, entry=16), BlockFlops(100, passed=70, active=200, entry=160)]
    head = BlockFlops(1000, passed=1001, active=2002, entry=2002)

    def flops(*active: int, **more: bool) -> int:
        return step_flops(
            blocks, head, active=active, **{"embeddings": False, "train_head": False, "checkpointing": False} | more
        )

    forward = 110 + 1000
    assert flops(1) == forward + 1001 + 160
    assert flops(0) == forward + 1001 + 70 + 16
    assert flops(0, 1) == forward + 1001 + 200 + 16
    assert flops(1, embeddings=True, train_head=True) == forward + 2002 + 200 + 7
    assert flops(1, checkpointing=True) == flops(1) + 100
    assert flops(0, checkpointing=True) == flops(0) + 110


def test_experts_count_as_often_as_a_token_meets_them() -> None:
    model = tiny_model("mixtral")
    structure = find(model)
    blocks, _ = step_parts(model, structure, structure.blocks, batch=2, length=16)
    dense = sum(p.shape[0] * p.shape[1] for p in structure.blocks[0].module.parameters() if p.dim() == 2)
    experts = 3 * 32 * 64  # gate, up and down
    attention = 4 * 16 * 32  # for each token: scores of 16 others and what they weigh, 4 heads of 8
    assert blocks[0].forward == 2 * 16 * (2 * (dense + 2 * experts) + attention)


def _executed_and_minimum(family: str, active: tuple[int, ...]) -> tuple[int, int]:
    model = tiny_model(family).train()
    sparse = trainer.prepare(model, selector=Fixed(blocks=active), always_on=())
    blocks, outside = step_parts(model, sparse.structure, sparse.blocks, batch=2, length=16)
    minimum = step_flops(blocks, outside, active=active, embeddings=False, train_head=False, checkpointing=False)
    ids = torch.randint(64, (2, 16))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops(), minimum


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "falcon", "mamba", "falcon_h1", "lfm2", "llama4_text"])
@pytest.mark.parametrize("active", [(0, 1), (2, 3)])
def test_a_plain_step_executes_the_minimum(family: str, active: tuple[int, ...]) -> None:
    """Of blocks of several kinds, too."""
    executed, minimum = _executed_and_minimum(family, active)
    assert executed == minimum > 0


def test_gradients_of_what_other_blocks_have_computed_are_not_counted() -> None:
    """In Gemma 3n, of keys and values that later blocks use again."""
    executed, minimum = _executed_and_minimum("gemma3n_text", (0, 1))
    assert 0.98 * executed <= minimum < executed
