"""fp16 with loss scaling, and optimizers whose moments have eight bits."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator

import trainer
from tests import distributed
from tests.engine.parity import Cell, batch, build_model, deepspeed_config, full_weights, make_engine, make_selector
from tests.engine.switching import TopGradientEntries

# --- fp16 --------------------------------------------------------------------------------------------------------


def start(cell: Cell, **prepare: Any) -> tuple[Any, trainer.Sparse]:
    # torch computes in fp16 on a CPU, slowly; DeepSpeed refuses to, for that reason.
    get_accelerator().is_fp16_supported = lambda: True
    model = build_model(cell)
    sparse = trainer.prepare(model, **{"selector": make_selector(cell), "bank": cell.bank, **prepare})
    engine = make_engine(cell, model, sparse)
    return engine, sparse


def _losses(rank: int, cells: list[Cell]) -> list[tuple[list[float], list[tuple[int, ...]], list[bool]]]:
    """Return (losses, active sets, whether the step was applied) of each cell."""
    found = []
    for cell in cells:
        engine, sparse = start(cell)
        sparse.attach(engine, guard_every=1)
        losses, sets, applied = [], [], []
        for step in range(cell.steps):
            ids = batch(step, 0, ranks=cell.ranks, rank=rank)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            sets.append(sparse.active)
            applied.append(engine.was_step_applied())
        engine.destroy()
        found.append((losses, sets, applied))
    return found


@pytest.mark.slow
def test_fp16_trains_as_fp32_does() -> None:
    points = ((1, "cpu"), (2, "discard"), (3, "cpu"))
    cells = [
        Cell(stage=stage, dtype=dtype, bank=bank, steps=10) for stage, bank in points for dtype in ("fp32", "fp16")
    ]
    found = distributed.run(_losses, cells, ranks=2)[0]
    for (expected, sets, _), (losses, half_sets, applied) in zip(found[::2], found[1::2], strict=True):
        assert all(applied) and half_sets == sets
        assert losses == pytest.approx(expected, rel=2e-3)
        assert losses[-1] != expected[-1]


@pytest.mark.slow
def test_steps_that_overflow_on_the_loss_scale_s_way_down_do_not_count() -> None:
    scaled = {"config": {"fp16": {"enabled": True, "initial_scale_power": 32, "hysteresis": 1}}}
    for stage in (2, 3):
        cell = Cell(stage=stage, dtype="fp16", steps=24, interval=2, extra=scaled)
        ((_, sets, applied),) = distributed.run(_losses, [cell], ranks=2)[0]
        assert not any(applied[:3]) and applied.count(True) > 6
        # Each step trains the set of the steps that were applied before it.
        assert sets == [make_selector(cell).select(sum(applied[:step]) // 2, cell.depth) for step in range(cell.steps)]


def _sparse_rule(rank: int) -> None:
    engine, sparse = start(Cell(stage=2, dtype="fp16"), update=TopGradientEntries(k=5))
    with pytest.raises(ValueError, match="fp16 gradients are scaled, which TopGradientEntries does not see"):
        sparse.attach(engine)


@pytest.mark.slow
def test_sparse_rules_would_see_scaled_gradients() -> None:
    distributed.run(_sparse_rule, ranks=1)


# --- eight bits --------------------------------------------------------------------------------------------------


def _eight_bits(rank: int, stages: tuple[int, ...]) -> list[tuple[float, float, bool]]:
    """Return by stage the last loss with eight bits and with 32, and whether only registered groups have state."""
    from bitsandbytes.optim import AdamW8bit

    found = []
    for stage in stages:
        losses = []
        for optimizer in (AdamW8bit, torch.optim.AdamW):
            cell = Cell(stage=stage, hidden=128, steps=8, interval=2)
            model = build_model(cell)
            sparse = trainer.prepare(model, selector=make_selector(cell))
            chosen = optimizer(sparse.param_groups(), lr=1e-3)
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=chosen, config=deepspeed_config(cell, micro_batch=2)
            )
            sparse.attach(engine, guard_every=1, saves=optimizer is not AdamW8bit)
            for _ in range(cell.steps):
                ids = batch(0, 0, ranks=2, rank=rank)  # the same, so that the loss falls
                loss = engine(input_ids=ids, labels=ids).loss
                engine.backward(loss)
                engine.step()
            losses.append(loss.item())
            if optimizer is AdamW8bit:
                states = engine.basic_optimizer.state.values()
                small = any(s["state1"].dtype is torch.uint8 for s in states) and len(states) <= len(
                    chosen.param_groups
                )
            assert all(w.isfinite().all() for w in full_weights(engine).values())
            engine.destroy()
        found.append((losses[0], losses[1], small))
    return found


@pytest.mark.slow
def test_eight_bit_moments_train_as_whole_ones_do() -> None:
    for found in distributed.run(_eight_bits, (2, 3), ranks=2):
        for eight, whole, small in found:
            assert small
            assert eight == pytest.approx(whole, rel=0.02) and whole < 3.5


def _banked(rank: int) -> None:
    from bitsandbytes.optim import AdamW8bit

    cell = Cell(stage=2, hidden=128, bank="cpu", interval=1)
    model = build_model(cell)
    sparse = trainer.prepare(model, selector=make_selector(cell), bank="cpu")
    optimizer = AdamW8bit(sparse.param_groups(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(cell, micro_batch=2))
    with pytest.raises(RuntimeError, match="banks can store .*, but AdamW8bit keeps .*"):
        sparse.attach(engine, saves=False)
    with pytest.raises(RuntimeError, match="checkpoints can store .*, but AdamW8bit keeps .*saves=False"):
        sparse.attach(engine)


@pytest.mark.slow
def test_eight_bit_moments_cannot_be_banked() -> None:
    distributed.run(_banked, ranks=1)
