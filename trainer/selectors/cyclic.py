"""BAdam's selector: the blocks in turn."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from trainer.selectors.base import Selector, keyed_generator, require_blocks
from trainer.settings import Count


class Cyclic(Selector):
    """Choose all blocks in turn, `blocks` at a time (BAdam, arXiv 2404.02827, algorithm 1).

    `ascending` starts at the embeddings' side, `descending` at the head's; `reshuffled` draws a new permutation in
    each round. If the blocks do not divide into equal turns, the last turn of a round is filled up with the first
    blocks of the same round.
    """

    name: Literal["cyclic"] = Field("cyclic", description="All blocks in turn (BAdam).")
    blocks: Count = Field(1, description="Active blocks at a time.")
    interval: Count = Field(100, description="Optimizer steps between two draws of blocks (BAdam's K).")
    order: Literal["ascending", "descending", "reshuffled"] = Field(
        "reshuffled", description="Order of the blocks in a round; reshuffled: a new permutation for each round."
    )

    def num_active(self, num_blocks: int) -> int:
        return require_blocks(self.blocks, num_blocks)

    def select(self, interval: int, num_blocks: int) -> tuple[int, ...]:
        size = self.num_active(num_blocks)
        round_number, turn = divmod(interval, math.ceil(num_blocks / size))
        order = list(range(num_blocks))
        if self.order == "descending":
            order.reverse()
        elif self.order == "reshuffled":
            order = [int(i) for i in keyed_generator(self.seed, round_number).permutation(num_blocks)]
        return tuple(sorted(order[(turn * size + i) % num_blocks] for i in range(size)))
