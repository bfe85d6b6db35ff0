"""BAdam's selector: the blocks in turn."""

from __future__ import annotations

import math
from typing import Literal

from trainer.selectors.base import Selector, keyed_generator, require_blocks


class Cyclic(Selector):
    """All blocks in turn, `blocks` at a time (BAdam, arXiv 2404.02827, algorithm 1).

    `ascending` starts at the embeddings' side, `descending` at the head's; `reshuffled` draws a new permutation each
    time round. Where the blocks do not divide into equal turns, the last turn of a round is filled up with the
    first blocks of the same round.
    """

    def __init__(
        self,
        *,
        blocks: int = 1,
        interval: int = 100,
        order: Literal["ascending", "descending", "reshuffled"] = "reshuffled",
        seed: int = 0,
    ) -> None:
        super().__init__(interval=interval, seed=seed)
        if order not in ("ascending", "descending", "reshuffled"):
            raise ValueError(f"selector.order: '{order}'; allowed: ascending, descending, reshuffled")
        self.blocks = blocks
        self.order = order

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
