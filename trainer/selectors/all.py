"""Select every block; with all parts always on this is full fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from trainer.selectors.base import Selector
from trainer.settings import Count


class All(Selector):
    """Choose all blocks in every interval; no switch ever happens."""

    constant: ClassVar[bool] = True

    name: Literal["all"] = Field("all", description="All blocks (full fine-tuning).")
    interval: Count = Field(20, description="Optimizer steps in an interval; the blocks are always the same.")

    def num_active(self, num_blocks: int) -> int:
        return num_blocks

    def select(self, interval: int, num_blocks: int) -> tuple[int, ...]:
        return tuple(range(num_blocks))
