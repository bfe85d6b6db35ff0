"""Train every weight of an active block with the engine's optimizer."""

from __future__ import annotations

from trainer.blocks import Block
from trainer.updates.base import UpdateRule


class Dense(UpdateRule):
    """All of a block's parameters are DeepSpeed's: masters, moments and step are partitioned by ZeRO (LISA, BAdam)."""

    def in_optimizer(self, block: Block) -> set[str]:
        return set(block.parameters)
