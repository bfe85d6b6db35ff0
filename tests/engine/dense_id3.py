"""ID3 written down densely for one process from the paper's formulas, and what differs from it through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import trainer
from tests.engine.parity import (
    ADAM,
    Cell,
    batch,
    build_model,
    full_weights,
    largest_difference,
    learning_rate,
    make_bank,
    make_engine,
    make_selector,
    train_step,
)
from trainer.updates import Unmask
from trainer.updates.adam import AdamSettings
from trainer.updates.unmask import target


def scalar_updates(*, budget: int, steps: int, total_steps: int) -> int:
    """Return how many updates of single weights `total_steps` optimizer steps make. The first `steps`, in which the
    mask grows, make about budget (steps + 1) / 2 in all, half as many as with a complete mask; each later
    step makes budget."""
    return sum(target(step, budget=budget, steps=steps) for step in range(1, total_steps + 1))


@dataclass(frozen=True)
class Case:
    """ID3 at the settings of `cell`. The mask grows in 5 of its steps."""

    cell: Cell = Cell(selector="all", steps=7)
    budget: int = 203
    exp: float = 0.0
    eps: float = 1e-3
    bias_correction: str = "global"
    steps: int = 5

    def rule(self) -> Unmask:
        return Unmask(
            budget=self.budget,
            growth_steps=self.steps,
            exp=self.exp,
            eps=self.eps,
            bias_correction=self.bias_correction,  # type: ignore[arg-type]
            adam=AdamSettings(ADAM["betas"], ADAM["eps"], self.cell.weight_decay),
            gradient_clipping=self.cell.clipping,
        )


@dataclass
class Reference:
    """Dense gradients, dense moments and a mask for every weight, in one process."""

    model: torch.nn.Module
    case: Case
    masks: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    updates: int = 0
    skipped: tuple[int, ...] = ()  # steps

    def run(self) -> None:
        cell = self.case.cell
        names = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.masks = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in names.items()}
        path = "base_model.model.model.layers" if cell.lora else "model.layers"
        blocks = [[n for n in names if n.startswith(f"{path}.{i}.")] for i in range(cell.depth)]
        outside = [n for n in names if ".layers." not in n]
        if not cell.lora:
            outside = [n for n in outside if self._part(n) in cell.always_on]
        selector, previous, taken = make_selector(cell), set(), 0
        for step in range(cell.steps):
            if step in self.skipped:
                continue
            drawn = selector.select(step // cell.interval, cell.depth)
            active = {n: names[n] for n in names if n in outside or any(n in blocks[i] for i in drawn)}
            if cell.bank == "discard" and taken % cell.interval == 0 and selector.changes(cell.depth):
                kept = outside if cell.redrawn == "reset" else [n for n in active if n in previous]
                self.state = {name: state for name, state in self.state.items() if name in kept}
            previous = set(active)
            self._step(step, taken, active)
            taken += 1

    @staticmethod
    def _part(name: str) -> str:
        return {"model.embed_tokens.weight": "embeddings", "lm_head.weight": "head"}.get(name, "norm")

    def _step(self, step: int, taken: int, active: dict[str, Tensor]) -> None:
        cell = self.case.cell
        self.model.zero_grad()
        for micro in range(cell.accumulation):
            for rank in range(cell.ranks):
                ids = batch(step, micro, ranks=cell.ranks, rank=rank)
                (self.model(input_ids=ids, labels=ids).loss / (cell.accumulation * cell.ranks)).backward()
        gradients = {n: p.grad for n, p in active.items()}
        with torch.no_grad():
            self._grow(step, active, gradients)
            for name in active:
                gradients[name] = gradients[name] * self.masks[name]
            if cell.clipping:
                norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
                for gradient in gradients.values():
                    gradient.mul_(min(1.0, cell.clipping / (norm.item() + 1e-6)))
            for name, p in active.items():
                self._adam(taken, name, p, gradients[name])
        self.updates += sum(int(self.masks[n].sum()) for n in active)

    def _grow(self, step: int, active: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        case = self.case
        t = min(step + 1, case.steps)
        wanted = t * (case.budget // case.steps) + min(t, case.budget % case.steps)
        k = wanted - sum(int(mask.sum()) for mask in self.masks.values())
        scores = torch.cat(
            [
                (gradients[n].abs() / (case.eps + p.abs()) ** case.exp).masked_fill(self.masks[n], -1).view(-1)
                for n, p in active.items()
            ]
        )
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        ranked = scores.sort(descending=True, stable=True).indices[:k]
        chosen[ranked[scores[ranked] >= 0]] = True
        for (name, p), part in zip(active.items(), chosen.split([p.numel() for p in active.values()]), strict=True):
            self.masks[name] |= part.view_as(p)

    def _adam(self, step: int, name: str, p: Tensor, gradient: Tensor) -> None:
        cell, mask, (b1, b2) = self.case.cell, self.masks[name], ADAM["betas"]
        s = self.state.setdefault(
            name, {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "t": torch.zeros_like(p, dtype=torch.int64)}
        )
        s["t"] += mask
        s["m"].mul_(b1).add_(gradient, alpha=1 - b1)
        s["v"].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        t = s["t"].clamp(min=1).double() if self.case.bias_correction == "local" else torch.full_like(p, step + 1.0)
        lr = ADAM["lr"] * learning_rate(cell, step)
        update = (s["m"] / (1 - b1**t)) / ((s["v"] / (1 - b2**t)).sqrt() + ADAM["eps"])
        decay = cell.weight_decay if p.dim() >= 2 else 0.0
        p.copy_(torch.where(mask, p * (1 - lr * decay) - lr * update.to(p.dtype), p))


def start(case: Case) -> tuple[Any, trainer.Sparse]:
    cell = case.cell
    return attach(case, build_model(cell))


def attach(case: Case, model: torch.nn.Module) -> tuple[Any, trainer.Sparse]:
    cell = case.cell
    sparse = trainer.prepare(
        model,
        selector=make_selector(cell),
        update=case.rule(),
        bank=make_bank(cell),
        always_on=None if cell.lora else cell.always_on,
        substrate="adapter" if cell.lora else "full",
    )
    engine = make_engine(cell, model, sparse)
    sparse.attach(engine, guard_every=1)
    return engine, sparse


def masks_of(engine: Any, sparse: trainer.Sparse) -> dict[str, Tensor]:
    shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in engine.module.named_parameters()}
    masks = {n: torch.zeros(shape, dtype=torch.bool, device=engine.device) for n, shape in shapes.items()}
    for name in sparse._slots.trained_by_rule(range(len(sparse.blocks))):
        masks[name].view(-1)[sparse.update.moved(name)] = True
    return masks


def compared(rank: int, case: Case, *, tolerance: float = 1e-6) -> list[str]:
    """Return what differs from the reference, and what moved that should not have."""
    engine, sparse = start(case)
    first = full_weights(engine)
    before, problems = dict.fromkeys(first, False), []
    for step in range(case.cell.steps):
        train_step(case.cell, engine, step, rank)
        after = masks_of(engine, sparse)
        if not all(bool(after[n][before[n]].all()) for n in after if torch.is_tensor(before[n])):
            problems.append(f"step {step}: the mask shrank")
        before = after
    weights, masks = full_weights(engine), masks_of(engine, sparse)
    expected = Reference(build_model(case.cell), case)
    expected.run()
    problems += [n for n in expected.masks if not torch.equal(masks[n], expected.masks[n])]
    difference = largest_difference(weights, {n: p.detach() for n, p in expected.model.named_parameters()})
    if not difference <= tolerance:
        problems.append(f"weights differ by {difference}")
    problems += [f"{n} moved" for n in weights if not torch.equal(weights[n][~masks[n]], first[n][~masks[n]])]
    rule = sparse.update
    assert isinstance(rule, Unmask)
    total = sum(int(mask.sum()) for mask in masks.values())
    if not total == rule.unmasked == case.budget or rule.updates != expected.updates:
        problems.append(f"{total} unmasked, {rule.updates} updates, expected {expected.updates}")
    wanted = scalar_updates(budget=case.budget, steps=case.steps, total_steps=case.cell.steps)
    if case.cell.selector == "all" and rule.updates != wanted:
        problems.append(f"{rule.updates} updates, by the formula {wanted}")
    engine.destroy()
    return [f"{case}: {problem}" for problem in problems]


def cases(ranks: int, *, every: bool) -> tuple[Case, ...]:
    def cell(**changed: Any) -> Cell:
        return Cell(**{"selector": "all", "steps": 7, "ranks": ranks, **changed})

    first = (
        # All weights at once, norms too, which do not decay: Adam.
        Case(cell(stage=0, weight_decay=0.1), budget=sum(p.numel() for p in build_model(Cell()).parameters()), steps=1),
        Case(cell(stage=1, weight_decay=0.1, accumulation=2), exp=1.0, eps=1e-2),
        Case(cell(stage=2, selector="uniform", bank="discard", steps=8), exp=0.5, bias_correction="local"),
        Case(cell(stage=3, weight_decay=0.1, accumulation=2, clipping=0.05, schedule="cosine")),
    )
    others = (
        Case(cell(stage=2, tied=True, clipping=0.05), bias_correction="local"),
        Case(cell(stage=3, always_on=()), budget=3),  # fewer than there are steps
        Case(cell(stage=3, selector="uniform", bank="device", steps=10), bias_correction="local"),
        Case(cell(stage=2, selector="uniform", bank="discard", steps=10)),
        Case(cell(stage=3, lora=4), budget=77),
        Case(cell(stage=2, checkpointing=True), budget=4001),
    )
    return first + others if every else first
