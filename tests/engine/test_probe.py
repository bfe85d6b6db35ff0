"""Probes of adapters in the middle of training leave no trace: weights, random numbers, ZeRO-3's prefetching."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model

import trainer
from tests import distributed
from tests.engine.parity import Cell, batch, full_weights, make_engine, probe_batch, summed_loss
from tests.models import tiny_llama
from trainer.engine.probe import Prober
from trainer.selectors import Importance, Measurement

ADAPTERS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.2},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},  # blended
}


class Forgetful(Importance):
    """Probes one set twice and another, and learns nothing from it: the draws are those of a run without probes."""

    def needs(self, step: int) -> Measurement | None:
        wanted = super().needs(step)
        return wanted and replace(wanted, trials=(wanted.trials[0], *wanted.trials[:2]))

    def observe(self, measurement: Measurement, result: tuple[float, ...]) -> None:
        assert result[0] == result[1], "without dropout"
        assert result[1] != result[2], "suppressing other blocks changes the loss"


class Idle(Importance):
    def needs(self, step: int) -> None:
        return None


def _trained(
    rank: int, cell: Cell, method: str, selector: Importance, raising: int = 0
) -> tuple[dict[str, Any], float, list[Any]]:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[method](task_type="CAUSAL_LM", **ADAPTERS[method])
    model = get_peft_model(tiny_llama(), config, autocast_adapter_dtype=False).train()
    with torch.no_grad():  # adapters that do something
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    sparse = trainer.prepare(model, selector=selector, bank="device", substrate="adapter")
    engine = make_engine(cell, model, sparse)
    probes = (probe_batch(number, ranks=2, rank=rank) for number in itertools.count())
    measured_losses = itertools.count(1)

    def loss_function(module: torch.nn.Module, ids: torch.Tensor) -> Any:
        result = summed_loss(module, ids)
        if next(measured_losses) == raising:
            raise ZeroDivisionError
        return result

    sparse.attach(engine, guard_every=1, probe_batches=probes, loss_function=loss_function)
    torch.manual_seed(5 + rank)
    orders: list[Any] = []
    measure, registration = sparse._measure, sparse._attached().registration

    def measured(step: int) -> None:
        measure(step)
        orders.append([names[module] for module in registration.fetch_order()])

    sparse._measure = measured  # type: ignore[method-assign]
    names = {module: name for name, module in model.named_modules()}
    for step in range(8):
        ids = batch(step, 0, ranks=2, rank=rank)
        try:
            loss = engine(input_ids=ids, labels=ids).loss
        except ZeroDivisionError:  # of a probe; the step is not measured again
            loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
    result = full_weights(engine), torch.rand(1).item(), orders
    engine.destroy()
    return result


def _compared(rank: int, stage: int, method: str, raising: int) -> tuple[bool, bool, list[Any], list[Any]]:
    cell = Cell(stage=stage, extra={"zero": {"stage3_prefetch_bucket_size": 100_000}})
    settings: dict[str, Any] = {"active_share": 0.34, "update_every": 3, "seed": 2}
    probed, noise, orders = _trained(rank, cell, method, Forgetful(**settings), raising)
    plain, plain_noise, plain_orders = _trained(rank, cell, method, Idle(**settings))
    return all(torch.equal(probed[n], plain[n]) for n in probed), noise == plain_noise, orders, plain_orders


@pytest.mark.parametrize(
    ("stage", "method", "raising"),
    [(2, "LORA", 0), (2, "IA3", 0), (3, "LORA", 0), (3, "IA3", 0), (3, "IA3", 2)],
)
def test_the_next_step_is_that_of_a_run_without_probes(stage: int, method: str, raising: int) -> None:
    """Check it also if the loss function raises at the `raising`th loss and the loop continues."""
    for same_weights, same_noise, orders, plain_orders in distributed.run(_compared, stage, method, raising, ranks=2):
        assert same_weights and same_noise
        assert orders == plain_orders
        assert all(order for order in orders[2:]) == (stage == 3), "ZeRO-3 prefetches along a recorded order"


# Going on after probes of an earlier process


class Numbered:
    """Numbers from 0 on that count how many were made."""

    def __init__(self) -> None:
        self.next, self.made = 0, 0

    def __iter__(self) -> Numbered:
        return self

    def __next__(self) -> int:
        self.next, self.made = self.next + 1, self.made + 1
        return self.next - 1


class Positioned(Numbered):
    def go_to(self, number: int) -> None:
        self.next = number


@pytest.mark.parametrize(("kind", "made"), [(Numbered, 1000), (Positioned, 0)])
def test_batches_of_the_past_are_only_made_if_there_is_no_other_way(kind: type[Numbered], made: int) -> None:
    batches = kind()
    prober = Prober(None, (), suppress=None, batches=batches, loss_function=None)  # type: ignore[arg-type]
    prober.skip(1000)
    assert (prober.taken, batches.made, next(batches)) == (1000, made, 1000)


def test_an_engine_that_was_used_goes_back_to_the_probe_of_its_checkpoint() -> None:
    batches = Positioned()
    prober = Prober(None, (), suppress=None, batches=batches, loss_function=None)  # type: ignore[arg-type]
    prober.skip(7)
    prober.skip(3)
    assert (prober.taken, next(batches)) == (3, 3)
