"""Learning-rate schedulers that were attached before stay valid."""

from __future__ import annotations

import pytest
import torch

import trainer
from tests import distributed
from tests.engine.parity import ADAM, Cell, build_model, deepspeed_config, make_selector, train_step


def _one_cycle(rank: int) -> list[float]:
    import deepspeed

    cell = Cell(stage=3, interval=1, steps=8)
    model = build_model(cell)
    sparse = trainer.prepare(model, selector=make_selector(cell))
    optimizer = torch.optim.AdamW(sparse.param_groups(), **ADAM)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(cell, micro_batch=2))
    sparse.attach(engine)
    rates = []
    for step in range(cell.steps):
        train_step(cell, engine, step, rank)
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_a_scheduler_that_counts_groups_stays_valid() -> None:
    rates, _ = distributed.run(_one_cycle, ranks=2)
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **ADAM)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(plain, max_lr=1e-2, total_steps=20)
    expected = []
    for _ in range(8):
        plain.step()
        scheduler.step()
        expected.append(plain.param_groups[0]["lr"])
    assert rates == pytest.approx(expected)
