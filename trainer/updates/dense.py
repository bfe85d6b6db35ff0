"""Train every weight of an active block with the engine's optimizer."""

from __future__ import annotations

from trainer.model.blocks import Block
from trainer.updates.base import UpdateRule


class Dense(UpdateRule):
    """Leave all of a block's parameters to DeepSpeed; ZeRO partitions masters, moments and step (LISA, BAdam)."""

    def in_optimizer(self, block: Block) -> set[str]:
        return set(block.parameters)
