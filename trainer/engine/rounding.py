"""Measure what is lost when a block is frozen again without its fp32 master weights: updates below the precision of its
weights.

A bf16 weight of 0.02 has a unit in the last place of 1.2e-4. Its master weight accumulates smaller steps, but bank
`discard` drops it at the switch. Of the interval's update, only the part that the bf16 weight shows remains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements sampled from each parameter on each rank.
_SAMPLE = 64


class RoundingLoss:
    """Follow a sample of master weights through an interval.

    `share` is the part of their update that the last switch lost. 0: nothing; 1: every sampled weight is what it was
    before the interval. None before the first switch.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.share: float | None = None
        self._dtype = dtype
        self._before: dict[int, Tensor] = {}
        self._updates: list[tuple[Tensor, Tensor]] = []

    def enter(self, group: int, masters: Sequence[Tensor]) -> None:
        """Begin an interval of optimizer group `group` with these masters (fp32, flat)."""
        self._before[group] = _sample(masters)

    def leave(self, group: int, masters: Sequence[Tensor]) -> None:
        """End the interval of `group`, whose masters are about to be dropped."""
        before, after = self._before.pop(group), _sample(masters)
        self._updates.append((after - before, after.to(self._dtype).float() - before))

    def finish(self) -> None:
        """Compute `share` after a switch, from the groups that left."""
        if self._updates:
            wanted, kept = (torch.cat(parts).abs() for parts in zip(*self._updates, strict=True))
            self._updates.clear()
            if wanted.any():  # all 0 in an interval with learning rate 0
                # A weight that is rounded up moves further than its master weight; that is noise, not learning.
                self.share = float(1 - torch.minimum(wanted, kept).sum() / wanted.sum())


def _sample(masters: Sequence[Tensor]) -> Tensor:
    return torch.cat([master[:_SAMPLE] for master in masters]).float().clone()


def half_unit(magnitude: float, dtype: torch.dtype) -> float:
    """Return half a unit in the last place of a number of that size: smaller updates of it are rounded away."""
    return torch.finfo(dtype).eps * 2.0 ** (torch.tensor(magnitude).log2().floor().item()) / 2
