"""Every block, always: with all parts always on this is full fine-tuning."""

from __future__ import annotations

from trainer.selectors.base import Selector


class All(Selector):
    """All blocks in every interval; no switch ever happens."""

    def __init__(self, *, interval: int = 20, seed: int = 0) -> None:
        super().__init__(interval=interval, seed=seed)

    def num_active(self, num_blocks: int) -> int:
        return num_blocks

    def select(self, interval: int, num_blocks: int) -> tuple[int, ...]:
        return tuple(range(num_blocks))
