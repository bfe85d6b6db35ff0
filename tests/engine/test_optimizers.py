"""Optimizers whose state is not Adam's: kept by banks and checkpoints by name, or refused when they are attached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests import distributed
from tests.checkpoint import test_resume
from tests.engine import parity
from tests.engine.parity import Cell, build_model, deepspeed_config, make_bank, make_selector
from trainer import prepare
from trainer.checkpoint.store import CheckpointError
from trainer.engine.zero.errors import RegistrationError
from trainer.engine.zero.state_layout import state_layout

Make = Callable[[Any], torch.optim.Optimizer]


def momentum(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9, dampening=0.1)


def plain_sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05)


def rmsprop(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups, lr=1e-3, momentum=0.5, centered=True)


def nadam(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.NAdam(groups, lr=1e-3)  # a product of momenta that begins at one


def adafactor(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=1e-2)  # of flat buffers it factors nothing


def amsgrad(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-3, amsgrad=True)


def quantised(groups: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, lr=1e-3)


def make_engine(make: Make) -> Any:
    def engine_of(cell: Cell, model: torch.nn.Module, sparse: Any) -> Any:
        import deepspeed

        optimizer = make(sparse.param_groups(weight_decay=cell.weight_decay))
        config = deepspeed_config(cell, micro_batch=4 // cell.ranks)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    return engine_of


def _exact(rank: int, made: list[tuple[Make, Cell]], folder: Path) -> list[str]:
    """Resume while blocks are switched: bit for bit as if never stopped."""
    problems = []
    for number, (make, cell) in enumerate(made):
        with mock.patch.object(parity, "make_engine", make_engine(make)):
            workspace = folder / str(number)
            problems += [f"{make.__name__}: {p}" for p in test_resume._exact(rank, [cell], workspace)]
    return problems


STEPS = test_resume.STEPS
QUICK = [(momentum, Cell(stage=2, bank="cpu", interval=1, steps=STEPS))]
ALL = [
    *((make, Cell(stage=3, bank="cpu", interval=1, steps=STEPS)) for make in (momentum, rmsprop, nadam, adafactor)),
    *((make, Cell(stage=2, bank="device", interval=1, steps=STEPS)) for make in (amsgrad, nadam, plain_sgd)),
    (momentum, Cell(stage=0, bank="cpu", interval=1, steps=STEPS)),
    (momentum, Cell(stage=1, interval=2, blocks=3, steps=STEPS)),
    (rmsprop, Cell(stage=3, lora=4, bank="device", interval=1, steps=STEPS)),
    (nadam, Cell(stage=2, dtype="bf16", bank="cpu", interval=1, steps=STEPS)),
]


@pytest.mark.parametrize("made", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_per_weight_state_is_banked_and_saved_by_name(tmp_path: Path, made: list[tuple[Make, Cell]]) -> None:
    problems = distributed.run(_exact, made, tmp_path, ranks=2, deadline=600)[0]
    assert not problems, "\n".join(problems)


def _attached(rank: int) -> list[str]:
    """Return what attaching says of (stage, optimizer, bank, saves)."""
    answers = []
    for stage, make, bank, saves in (
        (2, quantised, "discard", True),
        (3, quantised, "discard", True),
        (2, quantised, "cpu", False),
        (0, adafactor, "discard", True),
        (2, torch.optim.LBFGS, "discard", True),
        (2, quantised, "discard", False),
        (2, adafactor, "cpu", True),
    ):
        cell = Cell(stage=stage, ranks=1, bank=bank)
        model = build_model(cell)
        sparse = prepare(model, selector=make_selector(cell), bank=make_bank(cell))
        try:
            engine = make_engine(make)(cell, model, sparse)
            sparse.attach(engine, saves=saves)
            answers.append("attached")
        except (RegistrationError, ValueError) as error:
            answers.append(str(error))
    return answers


def test_state_that_cannot_be_cut_into_parameters_is_refused_when_attached() -> None:
    (answers,) = distributed.run(_attached, ranks=1)
    assert "AdamW8bit keeps" in answers[0] and "absmax" in answers[0] and "saves=False" in answers[0]
    assert "AdamW8bit keeps" in answers[1]
    assert answers[2].startswith("banks can store")
    assert "Adafactor keeps row_var" in answers[3]
    assert "attached" not in answers[4]
    assert answers[5:] == ["attached", "attached"]


def test_a_layout_is_found_without_a_trace() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    layout = state_layout(optimizer, flat=True, device=torch.device("cpu"))
    assert set(layout.per_weight) == {"exp_avg", "exp_avg_sq"} and set(layout.scalars) == {"step"} and not layout.other
    assert not optimizer.state and not calls and torch.equal(parameter.detach(), torch.ones(3))
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["params"] == [parameter]
    parameter.grad = torch.ones(3)
    optimizer.step()
    scheduler.step()
    assert calls == [1] and scheduler.get_last_lr() == [pytest.approx(0.01)]


def _with_another_optimizer(rank: int, folder: Path) -> str:
    cell = Cell(stage=2, ranks=1, steps=STEPS)
    for make in (momentum, amsgrad):
        with mock.patch.object(parity, "make_engine", make_engine(make)):
            engine, _ = parity.start(cell, rank)
        if make is momentum:
            parity.train_step(cell, engine, 0, rank)
            engine.save_checkpoint(folder)
            engine.destroy()
    try:
        engine.load_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    (answer,) = distributed.run(_with_another_optimizer, tmp_path, ranks=1)
    assert "has optimizer state momentum_buffer" in answer and "exp_avg, exp_avg_sq, max_exp_avg_sq" in answer
