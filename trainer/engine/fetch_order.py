"""Predict what ZeRO-3 will fetch after a switch, from how deep backward goes.

ZeRO-3 prefetches along the order of modules that it recorded in an earlier step. At the first module out of that order
it drops the recording, and runs without prefetch until it has made another. If nothing below the blocks trains,
backward ends at the lowest active block, so each switch that changes it would cost that. The new order follows from the
old one, because blocks of one structure are alike: `FetchOrder` works it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from torch import nn

from trainer.model.blocks import Block

# A block's modules by their names within it, in the order in which backward (and recomputation) reach them.
Names = tuple[str, ...]


class FetchOrder:
    """Order of modules in a training step, given the lowest block that backward reaches.

    The order of backward within a block is learned from recordings, separately for the lowest block, whose input needs
    no gradient, and for the others. It is assumed to be the same in all blocks with modules of the same names.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._modules = [dict(block.module.named_modules()) for block in blocks]
        self._kinds = [tuple(modules) for modules in self._modules]
        self._places = {
            id(module): (index, name) for index, modules in enumerate(self._modules) for name, module in modules.items()
        }
        self._within: dict[tuple[Names, bool], Names] = {}

    def after_switch(self, recorded: Sequence[nn.Module], *, lowest: int) -> list[nn.Module] | None:
        """Return the order of a step in which block `lowest` is the lowest that trains.

        `recorded` is the order of an earlier step. Returns None if it is still valid, or if the order is unknown: no
        step was recorded whole, something below the blocks trains, or a block of this structure was never seen.
        """
        split = self._split(recorded)
        if split is None:
            return None
        upper, backward = split
        reached = len(self._modules) - len(backward)
        for index, names in enumerate(reversed(backward), start=reached):
            self._within[self._kinds[index], index == reached] = names
        if reached == lowest:
            return None
        order = list(upper)
        for index in reversed(range(lowest, len(self._modules))):
            kind = self._kinds[index]
            way = self._within.get((kind, index == lowest)) or self._within.get((kind, index != lowest))
            if way is None:
                return None
            order += [self._modules[index][name] for name in way]
        return order

    def _split(self, recorded: Sequence[nn.Module]) -> tuple[list[nn.Module], list[Names]] | None:
        """Return forward and the backward above the blocks; then backward within each block, from the last one down."""
        runs = [
            (index, list(modules))
            for index, modules in groupby(recorded, key=lambda module: self._places.get(id(module), (None, ""))[0])
        ]
        visited = [index for index, _ in runs if index is not None]
        last = len(self._modules) - 1
        depth = len(visited) - len(self._modules)
        if depth < 1 or visited != [*range(last + 1), *range(last, last - depth, -1)] or runs[-1][0] is None:
            return None
        if any(index is None for index, _ in runs[-depth:]):
            return None
        upper = [module for _, modules in runs[:-depth] for module in modules]
        return upper, [tuple(self._places[id(module)][1] for module in modules) for _, modules in runs[-depth:]]
