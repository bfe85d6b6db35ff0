"""A selector that does not select: the same blocks in every interval."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.selectors.base import Selector


class Fixed(Selector):
    """The given `blocks` throughout; negative indices count from the end."""

    def __init__(self, *, blocks: Sequence[int], interval: int = 20, seed: int = 0) -> None:
        super().__init__(interval=interval, seed=seed)
        self.blocks = tuple(blocks)

    def num_active(self, num_blocks: int) -> int:
        return len(self.select(0, num_blocks))

    def select(self, interval: int, num_blocks: int) -> tuple[int, ...]:
        outside = [i for i in self.blocks if not -num_blocks <= i < num_blocks]
        chosen = {i % num_blocks for i in self.blocks}
        if outside or not chosen or len(chosen) != len(self.blocks):
            raise ValueError(
                f"selector.blocks: {list(self.blocks)}; allowed: distinct indices from {-num_blocks} to "
                f"{num_blocks - 1}, at least one, for this model of {num_blocks} blocks"
            )
        return tuple(sorted(chosen))

    def reachable(self, num_blocks: int) -> Sequence[int]:
        return self.select(0, num_blocks)
