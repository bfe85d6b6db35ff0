"""In bf16 with a bank, fp32 master weights survive a switch."""

from __future__ import annotations

from torch import Tensor

from tests import distributed
from tests.engine.parity import Cell, train_step
from tests.engine.switching import start
from trainer.selectors import Cyclic


def _bf16(rank: int, stages: tuple[int, ...]) -> list[tuple[bool, bool]]:
    """Tiny steps vanish in bf16 weights; with a bank the fp32 masters must remember them over a switch."""
    results = []
    for stage in stages:
        for bank in ("cpu", "discard"):
            cell = Cell(stage=stage, dtype="bf16", bank=bank, always_on=("norm",))
            # Ascending, because a block that is drawn twice in a row was not frozen in between.
            engine, sparse = start(cell, selector=Cyclic(blocks=1, interval=1, order="ascending"))
            for group in engine.basic_optimizer.param_groups:
                group["lr"] = 1e-7  # far below half a unit in the last place of a weight of 0.02
            numbers: dict[str, Tensor] = {}
            kept = []
            for step in range(13):  # two rounds over six blocks
                train_step(cell, engine, step, rank)
                for piece in sparse._attached().registration.slices(0):
                    if piece.name in numbers:
                        weight = sparse._attached().registration.shares.local_shard(
                            dict(engine.module.named_parameters())[piece.name]
                        )
                        part = weight[: piece.stop - piece.start] if stage == 3 else weight[piece.start : piece.stop]
                        drift = piece.tensors["master"] - part.float()
                        kept.append(bool((drift.abs() > 1.5e-7).any()))  # two steps' worth
                    numbers[piece.name] = piece.tensors["master"].clone()
            results.append((bank == "cpu", any(kept)))
            engine.destroy()
    return results


def test_with_a_bank_no_update_is_lost_at_a_switch_in_bf16() -> None:
    for results in distributed.run(_bf16, (1, 2, 3), ranks=2):
        for has_bank, remembered in results:
            assert remembered == has_bank
