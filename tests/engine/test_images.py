"""Training on images, mixed with text, equals a plain PyTorch loop around transformers' model and processor."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

import trainer
from tests import distributed
from tests.engine.parity import (
    ADAM,
    Cell,
    deepspeed_config,
    full_weights,
    largest_difference,
    make_engine,
    make_selector,
)
from tests.multimodal import PROCESSORS, Given, prepared, with_ids_of, write_images
from trainer.data.batches import collate
from trainer.data.cache import TokenisedData
from trainer.data.pictures import Pictures
from trainer.model.blocks import PARTS, TOWER_PARTS, find
from trainer.model.loss import Objective
from trainer.run.step import train_step

STEPS = 6
TOWERS = (*PARTS, *TOWER_PARTS)


def _rows(step: int, rank: int) -> list[list[int]]:
    """Two micro-batches of a rank, of two samples each. In every third step one rank has images and the other has none;
    of the samples, every third one is text."""
    if step % 3 == 2:
        return [[2, 5], [8, 11]] if rank == 0 else [[0, 1], [2, 3]]
    return [[(8 * step + 4 * rank + 2 * micro + i) % 24 for i in range(2)] for micro in range(2)]


def _plain_loss(model: nn.Module, processor: ProcessorMixin, data: TokenisedData, rows: list[int]) -> Tensor:
    """Return the summed loss, of one sample after another, each as transformers' processor makes it."""
    total = torch.zeros(())
    for row in rows:
        sample = data.train[row]
        labels = torch.tensor(sample["labels"]).long()[None]
        record = json.loads(str(sample["images"] or "null"))
        inputs: Any = {"input_ids": torch.tensor(sample["input_ids"]).long()[None]}
        if record:
            images = [Pictures._again(Given(processor), file, data.train_parts[0].places) for file in record["files"]]
            options = {"add_special_tokens": False, "return_tensors": "pt"}
            inputs = processor(text=[record["text"]], images=[images], **options)
        logits = model(**inputs).logits[:, :-1].float()
        total = total + nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total


def _reference(family: str, cell: Cell, folder: Path) -> tuple[dict[str, Tensor], list[float]]:
    processor = PROCESSORS[family]()
    data, model = prepared(folder, processor), with_ids_of(processor, family).train()
    structure = find(model)
    on = [p for part in cell.always_on for p in structure.outside[part].values()]
    model.requires_grad_(False)
    settings = {**ADAM, "weight_decay": 0.0}
    always, selector, losses = torch.optim.AdamW(on, **settings), make_selector(cell), []
    for step in range(STEPS):
        if step % cell.interval == 0:
            model.requires_grad_(False)
            drawn = [
                p for i in selector.select(step // cell.interval, 4) for p in structure.blocks[i].parameters.values()
            ]
            blocks = torch.optim.AdamW(drawn, **settings)
            for p in [*on, *drawn]:
                p.requires_grad_(True)
        rows = [row for rank in range(2) for micro in _rows(step, rank) for row in micro]
        count = sum(int((torch.tensor(data.train[row]["labels"])[1:] != -100).sum()) for row in rows)
        loss = _plain_loss(model, processor, data, rows) / count
        loss.backward()
        losses.append(float(loss.detach()))
        for p in on:  # no image in a step is a zero gradient, as on a rank of which others have some
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for optimizer in (always, blocks):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return {name: p.detach() for name, p in model.named_parameters()}, losses


def _strata(rank: int, family: str, cell: Cell, folder: Path, fused: bool) -> tuple[dict[str, Tensor], list[float]]:
    processor = PROCESSORS[family]()
    data, pictures = prepared(folder, processor), Given(processor)
    model = with_ids_of(processor, family).train()
    if cell.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    sparse = trainer.prepare(model, selector=make_selector(cell), always_on=cell.always_on)
    ds = deepspeed_config(cell, micro_batch=2)
    objective = Objective(model, fused=fused, deepspeed=ds)
    engine = make_engine(cell, model, sparse)
    sparse.attach(engine, guard_every=1)
    make = partial(collate, pad_id=256)
    losses = []
    for step in range(STEPS):
        batches = [
            pictures.add([data.train[row] for row in rows], [data.train_parts[0].places] * 2, make)
            for rows in _rows(step, rank)
        ]
        result = train_step(engine, objective, batches)
        losses.append(float(result.loss_sum / result.targets))
    weights = full_weights(engine)
    engine.destroy()
    return weights, losses


def _compare(rank: int, cases: tuple[tuple[str, Cell, bool], ...], folder: Path) -> dict[str, tuple[float, float]]:
    found = {}
    for family, cell, fused in cases:
        weights, losses = _strata(rank, family, cell, folder, fused)
        if rank == 0:
            expected, plain = _reference(family, cell, folder)
            apart = max(abs(a - b) for a, b in zip(losses, plain, strict=True))
            found[f"{family} {cell} fused={fused}"] = (largest_difference(weights, expected), apart)
    return found


def _check(cases: list[tuple[str, Cell, bool]], folder: Path) -> None:
    write_images(folder)
    for family in PROCESSORS:
        prepared(folder, PROCESSORS[family]())
    found = distributed.run(_compare, tuple(cases), folder, ranks=2, deadline=400)[0]
    assert len(found) == len(cases)
    assert all(weights <= 1e-6 and losses <= 2e-6 for weights, losses in found.values()), found


@pytest.mark.slow
def test_images_train_as_in_a_plain_loop(tmp_path: Path) -> None:
    cell = Cell(accumulation=2, steps=STEPS)
    cases = [
        (family, replace(cell, stage=stage, always_on=parts), False)
        for family in PROCESSORS
        for stage in (2, 3)
        for parts in (PARTS, TOWERS)
    ]
    cases += [("gemma3", replace(cell, stage=3, checkpointing=True, always_on=TOWERS), False)]
    cases += [(family, replace(cell, stage=stage), True) for family in PROCESSORS for stage in (2, 3)]
    _check(cases, tmp_path)


def test_one_of_them(tmp_path: Path) -> None:
    _check([("qwen2_5_vl", Cell(accumulation=2, steps=STEPS, stage=3, always_on=TOWERS), False)], tmp_path)
