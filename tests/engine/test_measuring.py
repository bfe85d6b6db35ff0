"""A selector that measures sees the right losses and leaves no trace in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trainer
from tests import distributed
from tests.engine.parity import Cell, batch, build_model, full_weights, make_engine, summed_loss, train_step
from tests.engine.switching import WorstToLose, start
from tests.models import tiny_llama
from trainer.selectors import Measurement


def _probe(rank: int, stages: tuple[int, ...]) -> list[Any]:
    results = []
    for stage in stages:
        outcomes = []
        for measuring in (True, False):
            cell = Cell(stage=stage, interval=100, steps=4, checkpointing=False)
            model = build_model(cell)
            selector = WorstToLose(interval=cell.interval, seed=3)
            if not measuring:
                selector.needs = lambda step: None  # type: ignore[method-assign]
            sparse = trainer.prepare(model, selector=selector)
            engine = make_engine(cell, model, sparse)
            ids = batch(99, 0, ranks=2, rank=rank)
            keep = 2 - rank  # ragged: ranks weigh by their tokens

            sparse.attach(engine, probe_batches=iter(lambda chosen=ids[:keep]: chosen, None), loss_function=summed_loss)
            torch.manual_seed(5)
            for step in range(cell.steps):
                train_step(cell, engine, step, rank)
            outcomes.append((full_weights(engine), torch.rand(1).item(), selector.losses))
            engine.destroy()
        (weights, noise, losses), (plain, plain_noise, _) = outcomes
        same = all(torch.equal(weights[n], plain[n]) for n in weights) and noise == plain_noise
        results.append((losses, same))
    return results


def _ablated_by_hand() -> list[float]:
    model = tiny_llama(layers=4).eval()
    rows = torch.cat([batch(99, 0, ranks=2, rank=0)[:2], batch(99, 0, ranks=2, rank=1)[:1]])
    losses = []
    for left_out in range(4):
        layers = torch.nn.ModuleList(layer for i, layer in enumerate(model.model.layers) if i != left_out)
        whole, model.model.layers = model.model.layers, layers
        model.config.num_hidden_layers = 3
        with torch.no_grad():
            logits = model(input_ids=rows).logits
        model.model.layers = whole
        model.config.num_hidden_layers = 4
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item())
    return losses


def test_a_measuring_selector_sees_right_losses_and_leaves_no_trace() -> None:
    results, others = distributed.run(_probe, (2, 3), ranks=2)
    expected = _ablated_by_hand()
    for (losses, same), (other_losses, _) in zip(results, others, strict=True):
        assert losses == other_losses
        assert losses == pytest.approx(expected, abs=1e-5)
        assert same


class LateMeasurer(WorstToLose):
    def needs(self, step: int) -> Measurement | None:
        return super().needs(step) if step else None


def _late(rank: int) -> None:
    cell = Cell(stage=2, interval=2)
    engine, _ = start(cell, selector=LateMeasurer(interval=2, seed=0))
    for step in range(4):
        train_step(cell, engine, step, rank)
    with pytest.raises(ValueError, match="LateMeasurer measures"):
        train_step(cell, engine, 4, rank)


def test_a_selector_that_measures_later_is_not_left_without_answers() -> None:
    distributed.run(_late, ranks=1)
