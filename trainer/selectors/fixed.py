"""Select the same blocks in every interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from trainer.selectors.base import Selector
from trainer.settings import Count


class Fixed(Selector):
    """Choose the given `blocks` throughout; negative indices count from the end."""

    constant: ClassVar[bool] = True

    name: Literal["fixed"] = Field("fixed", description="The same blocks throughout.")
    blocks: tuple[int, ...] = Field(strict=False, description="Indices of blocks; negative ones count from the end.")
    interval: Count = Field(20, description="Optimizer steps in an interval; the blocks are always the same.")

    @field_validator("blocks")
    @classmethod
    def _some_and_distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value:
            raise ValueError("got an empty list; name at least one block, such as selector.blocks=[0,-1]")
        twice = sorted({index for index in value if value.count(index) > 1})
        if twice:
            raise ValueError(f"got {list(value)}; name each block at most once; repeated: {twice}")
        return value

    def num_active(self, num_blocks: int) -> int:
        return len(self.select(0, num_blocks))

    def select(self, interval: int, num_blocks: int) -> tuple[int, ...]:
        outside = [i for i in self.blocks if not -num_blocks <= i < num_blocks]
        chosen = {i % num_blocks for i in self.blocks}
        if outside or len(chosen) != len(self.blocks):
            raise ValueError(
                f"selector.blocks: {list(self.blocks)}; allowed: distinct indices from {-num_blocks} to "
                f"{num_blocks - 1}, at least one, for this model of {num_blocks} blocks"
            )
        return tuple(sorted(chosen))

    def reachable(self, num_blocks: int) -> Sequence[int]:
        return self.select(0, num_blocks)
