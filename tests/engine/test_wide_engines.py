"""An engine that was built with all parameters is shrunk to the active set."""

from __future__ import annotations

import torch

import trainer
from tests import distributed
from tests.engine.parity import (
    ADAM,
    Cell,
    build_model,
    deepspeed_config,
    full_weights,
    largest_difference,
    make_selector,
    reference,
    train_step,
)


def _wide(rank: int, stages: tuple[int, ...]) -> list[tuple[float, bool]]:
    import deepspeed

    results = []
    for stage in stages:
        cell = Cell(stage=stage, steps=8, weight_decay=0.1)
        model = build_model(cell)
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, **ADAM)
        engine, held, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(cell, micro_batch=2)
        )
        model.requires_grad_(True)
        sparse = trainer.prepare(model, selector=make_selector(cell))
        sparse.attach(engine)
        for step in range(cell.steps):
            train_step(cell, engine, step, rank)
        expected, _ = reference(cell)
        live = {id(p) for group in sparse._attached().registration.registered() for p in group}
        wanted = {id(p) for p in sparse.trainable_parameters()}
        same_holder = held.__dict__ is engine.optimizer.__dict__ if stage else held is engine.optimizer
        results.append((largest_difference(full_weights(engine), expected), live == wanted and same_holder))
        engine.destroy()
    return results


def test_an_engine_built_with_everything_is_shrunk() -> None:
    for results in distributed.run(_wide, (0, 2, 3), ranks=2):
        for difference, narrow in results:
            assert difference <= 1e-6 and narrow
