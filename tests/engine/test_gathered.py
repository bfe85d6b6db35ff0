"""How much of a model ZeRO-3 has gathered at any time, and what is left of it after backward.

DeepSpeed's pull request 8148 describes frozen parameters that stay gathered after activation checkpointing has
recomputed a block. Parameters below the persistence threshold stay gathered by design, and are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from tests import distributed
from tests.engine.parity import Cell, start, train_step

# Two blocks of a Llama of twelve train at a time, and nothing below the blocks.
PLAIN = Cell(interval=2, steps=8, accumulation=2, checkpointing=True, always_on=("head", "norm"))
NO_PERSISTENCE = {"zero": {"stage3_param_persistence_threshold": 0}}
CELLS = (
    replace(PLAIN, extra=NO_PERSISTENCE),
    PLAIN,
    replace(PLAIN, lora=4, bank="device", extra=NO_PERSISTENCE),
    replace(PLAIN, lora=4, bank="device"),
    replace(PLAIN, lora=4, bank="device", selector="all", blocks=0),
)


@dataclass
class _Watch:
    """The most elements of the blocks that are gathered, seen before and after every module's forward and backward."""

    model: torch.nn.Module
    most: int = 0

    def __post_init__(self) -> None:
        self.blocks = list(self.model.get_submodule(_path(self.model)))
        self.inside = [p for block in self.blocks for p in block.parameters()]
        for module in (child for block in self.blocks for child in block.modules()):
            module.register_forward_pre_hook(self.look)
            module.register_forward_hook(self.look)
            module.register_full_backward_pre_hook(self.look)
            module.register_full_backward_hook(self.look)

    @property
    def gathered(self) -> int:
        held = [p for p in self.inside if p.ds_status is not ZeroParamStatus.NOT_AVAILABLE and not p.ds_persist]
        return sum(p.ds_numel for p in held)

    @property
    def block(self) -> int:
        """Return the elements of a block that are gathered when they are needed."""
        return max(sum(p.ds_numel for p in block.parameters() if not p.ds_persist) for block in self.blocks)

    def look(self, *_: Any) -> None:
        self.most = max(self.most, self.gathered)


def _path(model: torch.nn.Module) -> str:
    return next(name for name, module in model.named_modules() if name.endswith("layers"))


def _gathered(rank: int, cells: tuple[Cell, ...]) -> list[str]:
    problems = []
    for cell in cells:
        # The limits that size_buckets sets for a run, but no prefetch, which may have the next block on its way.
        size = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
        cell = replace(cell, extra={"zero": {**size, **cell.extra.get("zero", {})}})
        engine, _ = start(cell, rank)
        watch = _Watch(engine.module)
        for step in range(cell.steps):
            for micro in range(cell.accumulation):
                watch.most = 0
                train_step(replace(cell, accumulation=1), engine, 2 * step + micro, rank)
                if not 0.2 * watch.block <= watch.most <= 1.25 * watch.block:  # nothing seen would show nothing
                    problems.append(f"{cell}: {watch.most / watch.block:.2f} blocks gathered in step {step}.{micro}")
                if watch.gathered:
                    problems.append(f"{cell}: {watch.gathered} elements left gathered after step {step}.{micro}")
        engine.destroy()
    return problems


@pytest.mark.slow
def test_one_block_is_gathered_at_a_time_and_none_is_left() -> None:
    for problems in distributed.run(_gathered, CELLS, ranks=2, deadline=600):
        assert not problems, "\n".join(problems)
