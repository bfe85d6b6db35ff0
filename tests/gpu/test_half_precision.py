"""fp16 on its loss scale's way down, and bf16 with masters that are away in host memory."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import trainer
from tests import distributed
from tests.engine.parity import Cell, batch, build_model, full_weights, make_engine, make_selector
from tests.engine.switching import start
from tests.gpu import RANKS

pytestmark = pytest.mark.gpu

STAGES = (2, 3)
OVERLAPPING = {"zero": {"overlap_comm": True}}


@dataclass(frozen=True)
class Step:
    """A step under loss scaling: what was to train, what moved, and the scale after it."""

    active: tuple[int, ...]
    moved: tuple[int, ...]
    applied: bool
    scale: float
    loss: float


def _scaled(rank: int, cells: list[Cell]) -> list[list[Step]]:
    found = []
    for cell in cells:
        engine, sparse = start(cell)
        ids = batch(0, 0, ranks=cell.ranks, rank=rank)  # the same at every step, so that the loss falls
        steps = []
        for _ in range(cell.steps):
            before = full_weights(engine)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            after = full_weights(engine)
            changed = {name for name in after if not torch.equal(before[name], after[name])}
            moved = tuple(block.index for block in sparse.blocks if changed & block.parameters.keys())
            scale = engine.optimizer.cur_scale
            steps.append(Step(sparse.active, moved, engine.was_step_applied(), scale, loss.item()))
        engine.destroy()
        found.append(steps)
    return found


def test_overflowing_steps_in_fp16_move_nothing_and_do_not_count() -> None:
    power = 32
    fp16 = {"enabled": True, "initial_scale_power": power, "hysteresis": 1}
    cells = [
        Cell(stage=stage, ranks=RANKS, family="llama", dtype="fp16", steps=24, extra={"config": {"fp16": fp16}})
        for stage in STAGES
    ]
    for found in distributed.run(_scaled, cells, ranks=RANKS, accelerator="cuda"):
        for cell, steps in zip(cells, found, strict=True):
            applied = [step.applied for step in steps]
            assert not any(applied[:3]) and sum(applied) > 6
            draws = [make_selector(cell).select(sum(applied[:i]) // cell.interval, 4) for i in range(cell.steps)]
            assert [step.active for step in steps] == draws
            assert [step.moved for step in steps] == [step.active if step.applied else () for step in steps]
            assert [step.scale for step in steps] == [
                2.0 ** (power - applied[: i + 1].count(False)) for i in range(cell.steps)
            ]
            losses = [step.loss for step in steps if step.applied]
            assert losses[-1] < losses[0] - 0.1


@dataclass
class Banked:
    """A run: its losses, how many tensors of state came back, which of these had changed, and how all were stored."""

    losses: list[float]
    returned: int
    changed: list[tuple[str, str]]
    pinned: bool


def _banked(rank: int, cells: list[Cell]) -> list[Banked]:
    found = []
    for cell in cells:
        model = build_model(cell)
        sparse = trainer.prepare(model, selector=make_selector(cell), bank="cpu")
        engine = make_engine(cell, model, sparse)
        sparse.attach(engine, guard_every=0)
        ids = batch(0, 0, ranks=cell.ranks, rank=rank)
        present, last = state_of(sparse).keys(), {}
        losses, changed, returned = [], [], 0
        for _ in range(cell.steps):
            loss = engine(input_ids=ids, labels=ids).loss  # a switch comes first
            sparse.bank.wait()
            entered = {key: value for key, value in state_of(sparse).items() if key not in present and key in last}
            returned += len(entered)
            changed += [key for key, value in entered.items() if not torch.equal(value, last[key])]
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            present = state_of(sparse).keys()
            last |= state_of(sparse)
        pinned = [t.is_pinned() for piece in sparse.bank._stored.values() for t in piece.tensors.values()]
        engine.destroy()
        found.append(Banked(losses, returned, changed, bool(pinned) and all(pinned)))
    return found


def state_of(sparse: trainer.Sparse) -> dict[tuple[str, str], Tensor]:
    """Copies of this rank's masters and moments, by parameter and kind."""
    registration = sparse._attached().registration
    pieces = [piece for number in range(len(registration.groups)) for piece in registration.slices(number)]
    return {(piece.name, kind): tensor.clone() for piece in pieces for kind, tensor in piece.tensors.items()}


def test_masters_come_back_from_page_locked_memory_and_bf16_trains_as_fp32_does() -> None:
    cells = [
        Cell(stage=stage, ranks=RANKS, dtype=dtype, interval=1, steps=20, extra=OVERLAPPING)
        for stage in STAGES
        for dtype in ("fp32", "bf16")
    ]
    for found in distributed.run(_banked, cells, ranks=RANKS, accelerator="cuda"):
        for run in found:
            assert run.returned and not run.changed and run.pinned
        for whole, half in zip(found[::2], found[1::2], strict=True):
            assert half.losses == pytest.approx(whole.losses, rel=3e-3)
            assert whole.losses[-1] < whole.losses[0] - 0.1
