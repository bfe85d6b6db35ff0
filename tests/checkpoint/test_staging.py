"""Copies in host memory: of tensors wherever they lie, and in time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests import distributed
from tests.checkpoint.test_resume import STEPS, largest_difference, resumed, start, train_step, undisturbed
from tests.engine.parity import Cell
from trainer.checkpoint import staging
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.staging import Staging


def test_tensors_are_copied_wherever_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_CHUNK", 2**10)
    flat = torch.randn(700)
    half = torch.randn(300).bfloat16()
    tensors = [
        *(flat[begin:end] for begin, end in ((100, 300), (300, 301), (301, 550), (0, 100), (600, 700), (650, 700))),
        *half.split(77),
        flat[:0],
        torch.arange(500),  # larger than a chunk
        flat[::2],
    ]
    copier = Staging()
    for attempt in range(3):
        flat.add_(attempt)
        copies = copier.lay_out(tensors if attempt != 1 else tensors[::-1])
        copier.order()
        copier.run()
        expected = tensors if attempt != 1 else tensors[::-1]
        assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, expected, strict=True))
        before = [copy.clone() for copy in copies]
        flat.add_(1)
        assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, before, strict=True))
        flat.sub_(1)


def test_neighbours_are_one_copy() -> None:
    parts = torch.randn(1000).split(100)
    _, copies = Staging()._targets([*parts[::-1], torch.randn(3)])
    assert sorted(copy.numel for copy in copies) == [3, 1000]


def _late(rank: int, cells: list[Cell], workspace: Path) -> list[str]:
    """Each copy begins when training has had time to go on."""
    inner = Staging.run

    def run(self: Staging) -> None:
        time.sleep(0.5)
        inner(self)

    problems = []
    for number, cell in enumerate(cells):
        expected = undisturbed(rank, cell)
        engine, sparse = start(cell, rank)
        checkpoints = Checkpoints(sparse, workspace / str(number), keep=2, asynchronous=True)
        for step in range(5):
            train_step(cell, engine, step, rank)
        Staging.run = run
        scheduler = engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None
        checkpoints.save(5, {"scheduler": scheduler})
        if number == 0:  # as a loop does that writes to weights itself
            sparse.change()
            before = [parameter.data.clone() for parameter in engine.module.parameters()]
            for parameter in engine.module.parameters():
                parameter.data.zero_()
            time.sleep(0.7)
            for parameter, data in zip(engine.module.parameters(), before, strict=True):
                parameter.data.copy_(data)
        train_step(cell, engine, 5, rank)
        Staging.run = inner
        checkpoints.finish()
        engine.destroy()
        found = resumed(rank, cell, workspace / str(number))
        if largest_difference(expected, found):
            problems.append(f"{cell}: {largest_difference(expected, found):.1e}")
    return problems


def test_training_waits_for_a_copy_before_it_changes_anything(tmp_path: Path) -> None:
    """Whether the next thing is a step or a switch."""
    cells = [
        Cell(stage=2, bank="cpu", interval=5, steps=STEPS),
        Cell(stage=3, interval=10, steps=STEPS),
        Cell(stage=3, bank="cpu", interval=1, steps=STEPS),  # what is banked is not copied, and comes back at once
    ]
    assert distributed.run(_late, cells, tmp_path, ranks=2)[0] == []
