"""Helpers of the tests of switching: an attached engine, an uneven model, and toys that prove the interfaces."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

import trainer
from tests.engine.parity import Cell, build_model, make_engine, make_selector, train_step
from tests.models import tiny_llama
from trainer.model.blocks import Block
from trainer.selectors import Measurement, Selector, keyed_generator
from trainer.updates import UpdateRule


def start(cell: Cell, **prepare: Any) -> tuple[Any, trainer.Sparse]:
    model = build_model(cell)
    options = {"selector": make_selector(cell), "bank": cell.bank, "always_on": cell.always_on} | prepare
    sparse = trainer.prepare(model, **options)
    engine = make_engine(cell, model, sparse)
    sparse.attach(engine, guard_every=1)
    return engine, sparse


def memory_problems(rank: int, cells: tuple[Cell, ...]) -> list[str]:
    """Return what grows, or changes its number or identity, while blocks switch."""
    problems = []
    for cell in cells:
        stage = cell.stage
        engine, sparse = start(cell)
        live, identity = [], (id(engine.basic_optimizer), id(engine.optimizer))
        for step in range(cell.steps):
            train_step(cell, engine, step, rank)
            gc.collect()
            tensors = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in gc.get_objects()
                if issubclass(type(t), Tensor) and t.device.type == "cpu"
            }
            for piece in sparse.bank._stored.values():
                for t in piece.tensors.values():
                    tensors.pop(t.untyped_storage().data_ptr(), None)
            live.append(sum(tensors.values()))
            if sum(len(g["params"]) > 1 for g in engine.basic_optimizer.param_groups) and stage:
                problems.append("a group holds more than its flat tensor")
        if max(live[3:]) > 1.001 * live[3]:
            problems.append(f"stage {stage}: live bytes {live}")
        inactive = sum(b.numel for b in sparse.blocks if b.index not in sparse.active)
        if not 0 < sparse.bank.num_bytes <= 12 * inactive / (2 if stage else 1) + 64:
            problems.append(f"stage {stage}: bank {sparse.bank.num_bytes} bytes for {inactive} inactive parameters")
        if identity != (id(engine.basic_optimizer), id(engine.optimizer)):
            problems.append("the optimizer's identity changed")
        if len(engine.basic_optimizer.param_groups) != 2 * 2 + 3:
            problems.append(f"{len(engine.basic_optimizer.param_groups)} groups")
        engine.destroy()
    return problems


def uneven_model() -> torch.nn.Module:
    """Build a Llama whose MLPs differ in width from block to block, and one of which has biases."""
    model = tiny_llama(layers=4)
    torch.manual_seed(1)
    for index, layer in enumerate(model.model.layers):
        width = 32 + 16 * index
        layer.mlp.gate_proj = torch.nn.Linear(32, width, bias=False)
        layer.mlp.up_proj = torch.nn.Linear(32, width, bias=index == 2)
        layer.mlp.down_proj = torch.nn.Linear(width, 32, bias=False)
        for name, parameter in layer.mlp.named_parameters():  # as transformers does: torch's are eight times as large,
            if name.endswith("weight"):  # and with them what another order of summation leaves
                torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


class TopGradientEntries(UpdateRule):
    """A toy: of each matrix on this rank, plain gradient descent on the k entries with the largest first gradient."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.chosen: dict[str, Tensor] = {}
        self.received: dict[str, Tensor] = {}

    def in_optimizer(self, block: Block) -> set[str]:
        return {name for name, p in block.parameters.items() if len(getattr(p, "ds_shape", p.shape)) == 1}

    def leave(self, name: str, *, keep: bool) -> None:
        self.chosen.pop(name, None)

    def receive(self, name: str, gradient: Tensor, weights: Tensor, *, last: bool) -> None:
        self.received[name] = self.received[name] + gradient if name in self.received else gradient.clone()

    def discard(self) -> None:
        self.received.clear()

    def step(self, name: str, weights: Tensor, *, lr: float) -> None:
        gradient = self.received.pop(name)
        if name not in self.chosen:
            self.chosen[name] = gradient.abs().topk(min(self.k, gradient.numel())).indices
        weights[self.chosen[name]] -= 10 * lr * gradient[self.chosen[name]]


class WorstToLose(Selector):
    """A toy: measures the loss without each block, and trains those that are missed most."""

    def __init__(self, *, interval: int, seed: int) -> None:
        super().__init__(interval=interval, seed=seed)
        self.losses: tuple[float, ...] = ()

    def num_active(self, num_blocks: int) -> int:
        return 2

    def select(self, interval: int, num_blocks: int) -> tuple[int, ...]:
        if not self.losses:
            return tuple(sorted(int(i) for i in keyed_generator(self.seed, interval).permutation(num_blocks)[:2]))
        ranked = sorted(range(num_blocks), key=lambda i: self.losses[i], reverse=True)
        return tuple(sorted(ranked[:2]))

    def needs(self, step: int) -> Measurement | None:
        return Measurement("ablated_loss", tuple((i,) for i in range(4))) if step % 4 == 0 else None

    def observe(self, measurement: Measurement, result: tuple[float, ...]) -> None:
        self.losses = result
