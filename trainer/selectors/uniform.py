"""LISA's selector: every block with the same probability."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.selectors.base import Selector, keyed_generator, require_blocks
from trainer.settings import Count


class Uniform(Selector):
    """Draw `blocks` blocks without replacement, uniformly, at each interval (LISA, arXiv 2403.17919, algorithm 1)."""

    name: Literal["uniform"] = Field("uniform", description="Blocks drawn uniformly without replacement (LISA).")
    blocks: Count = Field(2, description="Active blocks at a time (LISA's gamma).")
    interval: Count = Field(20, description="Optimizer steps between two draws of blocks (LISA's K).")

    def num_active(self, num_blocks: int) -> int:
        return require_blocks(self.blocks, num_blocks)

    def select(self, interval: int, num_blocks: int) -> tuple[int, ...]:
        drawn = keyed_generator(self.seed, interval).permutation(num_blocks)[: self.num_active(num_blocks)]
        return tuple(sorted(int(i) for i in drawn))
