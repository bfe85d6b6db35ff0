"""An asynchronous save copies on a stream of its own, beside what the device computes next."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import distributed
from tests.engine.parity import Cell, batch, full_weights, start, train_step
from tests.gpu import RANKS
from tests.gpu.test_half_precision import state_of
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.staging import Staging
from trainer.checkpoint.store import Store

pytestmark = pytest.mark.gpu

SAVED_AT = 5
SLOW = 10**9  # of the device's clock, 1 to 2 GHz: long against a step


class SlowStaging(Staging):
    def run(self) -> None:
        torch.cuda.set_device(self._stream.device_index)
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(SLOW)
        super().run()

    @property
    def copying(self) -> bool:
        return not self._done.is_set()


def _beside(rank: int, cells: list[Cell], workspace: Path) -> list[tuple[bool, bool, list[str]]]:
    """By cell: whether forward was over before anything was copied, whether copying was over when the next step was,
    and what differs in an engine that resumed from what was there at the save."""
    found = []
    for number, cell in enumerate(cells):
        engine, sparse = start(cell, rank)
        checkpoints = Checkpoints(sparse, workspace / str(number), keep=1, asynchronous=True)
        checkpoints._staging = staging = SlowStaging()
        for step in range(SAVED_AT):
            train_step(cell, engine, step, rank)
        saved = _all(engine, sparse)
        checkpoints.save(SAVED_AT, {})
        ids = batch(SAVED_AT, 0, ranks=cell.ranks, rank=rank)
        loss = engine(input_ids=ids, labels=ids).loss
        loss.item()
        beside = staging.copying
        engine.backward(loss)
        engine.step()
        waited = not staging.copying
        for step in range(SAVED_AT + 1, SAVED_AT + 4):  # switches, which use the memory of what has left
            train_step(cell, engine, step, rank)
        checkpoints.finish()
        engine.destroy()
        engine, sparse = start(cell, rank)
        Checkpoints(sparse, workspace / str(number), keep=1, asynchronous=False).resume(
            Store(workspace / str(number)), SAVED_AT
        )
        again = _all(engine, sparse)
        differing = [name for name in saved if name not in again or not torch.equal(saved[name], again[name])]
        found.append((beside, waited, differing))
        engine.destroy()
    return found


def _all(engine: object, sparse: object) -> dict[str, Tensor]:
    sparse.bank.wait()  # type: ignore[attr-defined]
    state = {f"{name} {kind}": value for (name, kind), value in state_of(sparse).items()}  # type: ignore[arg-type]
    banked = {
        f"banked {key} {kind}": value.clone()
        for key, piece in getattr(sparse.bank, "_stored", {}).items()  # type: ignore[attr-defined]
        for kind, value in piece.tensors.items()
    }
    return full_weights(engine) | state | banked


def test_copies_run_beside_the_forward_and_the_step_waits(tmp_path: Path) -> None:
    cells = [
        Cell(stage=1, ranks=RANKS),
        Cell(stage=2, ranks=RANKS, bank="cpu", dtype="bf16"),
        Cell(stage=3, ranks=RANKS, bank="cpu"),
        Cell(stage=3, ranks=RANKS, bank="device", dtype="bf16"),
    ]
    for found in distributed.run(_beside, cells, tmp_path, ranks=RANKS, accelerator="cuda"):
        for cell, (beside, waited, differing) in zip(cells, found, strict=True):
            assert beside and waited and not differing, (str(cell), beside, waited, differing[:5])
