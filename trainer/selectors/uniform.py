"""LISA's selector: every block with the same probability."""

from __future__ import annotations

from trainer.selectors.base import Selector, keyed_generator, require_blocks


class Uniform(Selector):
    """`blocks` blocks without replacement, uniformly, anew at each interval (LISA, arXiv 2403.17919, algorithm 1)."""

    def __init__(self, *, blocks: int = 2, interval: int = 20, seed: int = 0) -> None:
        super().__init__(interval=interval, seed=seed)
        self.blocks = blocks

    def num_active(self, num_blocks: int) -> int:
        return require_blocks(self.blocks, num_blocks)

    def select(self, interval: int, num_blocks: int) -> tuple[int, ...]:
        drawn = keyed_generator(self.seed, interval).permutation(num_blocks)[: self.num_active(num_blocks)]
        return tuple(sorted(int(i) for i in drawn))
