"""What bf16 rounds away when a master is dropped: by hand, on an engine, and the warning before a run."""

from __future__ import annotations

import pytest
import torch

import trainer
from tests import distributed
from tests.engine.parity import Cell, build_model, make_engine, train_step
from trainer.config import load
from trainer.engine.rounding import RoundingLoss, half_unit
from trainer.run.remarks import rounding_warning
from trainer.selectors import Cyclic


def test_share_by_hand() -> None:
    """Around 1 a bf16 unit is 2^-7 = 0.0078125 upwards."""
    loss = RoundingLoss(torch.bfloat16)
    loss.enter(0, [torch.ones(4)])
    # Far below half a unit: lost. Two units and a bit: the bit is lost. Just above half a unit: rounds up, not lost.
    loss.leave(0, [torch.tensor([1.001, 1.016, 1.005, 1.0])])
    assert loss.share is None, "the switch is not over"
    loss.finish()
    lost = 0.001 + (0.016 - 0.015625)
    assert loss.share == pytest.approx(lost / (0.001 + 0.016 + 0.005), rel=1e-3)


@pytest.mark.parametrize(
    ("magnitude", "dtype", "expected"),
    [(1.0, torch.bfloat16, 2.0**-8), (0.02, torch.bfloat16, 2.0**-14), (1.5, torch.float16, 2.0**-11)],
)
def test_half_a_unit(magnitude: float, dtype: torch.dtype, expected: float) -> None:
    assert half_unit(magnitude, dtype) == expected
    number = torch.tensor(magnitude).to(dtype)
    assert (number.float() + 0.9 * expected).to(dtype) == number != (number.float() + 1.1 * expected).to(dtype)


def _shares(rank: int) -> list[tuple[float | None, float | None]]:
    found = []
    for stage in (2, 3):
        for bank, dtype, lr in (
            ("discard", "bf16", 1e-7),
            ("discard", "bf16", 1e-1),
            ("cpu", "bf16", 1e-7),
            ("discard", "fp32", 1e-7),
        ):
            cell = Cell(stage=stage, bank=bank, dtype=dtype)
            model = build_model(cell)
            selector = Cyclic(blocks=1, interval=1, order="ascending")
            sparse = trainer.prepare(model, selector=selector, bank=bank)
            engine = make_engine(cell, model, sparse)
            for group in engine.basic_optimizer.param_groups:
                group["lr"] = lr
            sparse.attach(engine)
            train_step(cell, engine, 0, rank)
            before = sparse.rounded_away
            train_step(cell, engine, 1, rank)
            found.append((before, sparse.rounded_away))
            engine.destroy()
    return found


@pytest.mark.slow
def test_the_share_of_an_interval_that_a_switch_loses() -> None:
    for found in distributed.run(_shares, ranks=2):
        for tiny, large, banked, exact in (found[:4], found[4:]):
            assert tiny[0] is None and tiny[1] > 0.99
            assert large[0] is None and large[1] < 0.1
            assert banked == exact == (None, None)


@pytest.mark.parametrize(
    ("lr", "bank", "warned"), [(1e-7, "discard", True), (1e-3, "discard", False), (1e-7, "cpu", False)]
)
def test_a_run_that_would_lose_nearly_everything_is_warned_about(lr: float, bank: str, warned: bool) -> None:
    values = ["method=lisa", f"optimizer.lr={lr}", f"bank.name={bank}", "train.steps=1", "train.global_batch_size=1"]
    config = load(None, [*values, "data.train=x.jsonl", "model.path=/x"], check_files=False)
    model = build_model(Cell(dtype="bf16"))
    sparse = trainer.prepare(model, selector=Cyclic(blocks=1, interval=20), bank=bank)
    lines = rounding_warning(config, sparse)
    assert bool(lines) == warned
    if warned:
        assert "optimizer.lr=1e-07 a weight moves by at most 2.0e-06" in lines[0] and "bank.name=cpu" in lines[0]
