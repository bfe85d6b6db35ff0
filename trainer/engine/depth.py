"""How deep backward goes, and what ZeRO-3 will therefore fetch.

ZeRO-3 prefetches along the order of modules that it recorded in an earlier step. At the first module out of that order
it throws the recording away, and the steps until it has made another run without prefetch. Where nothing below the
blocks trains, backward ends at the lowest active block, so a switch that moves it would cost that every time. The new
order follows from the old one, because blocks of one structure are alike: `FetchOrder` works it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from torch import nn

from trainer.blocks import Block

# A block's modules by their names within it, in the order in which backward (and recomputation) reach them.
Names = tuple[str, ...]


class FetchOrder:
    """Orders of modules in a training step, by the lowest block that backward reaches.

    What backward does within a block is learned from recordings, apart for the lowest block, whose input needs no
    gradient, and the others; it is assumed to be the same in all blocks that hold modules of the same names.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._modules = [dict(block.module.named_modules()) for block in blocks]
        self._kinds = [tuple(modules) for modules in self._modules]
        self._places = {
            id(module): (index, name) for index, modules in enumerate(self._modules) for name, module in modules.items()
        }
        self._within: dict[tuple[Names, bool], Names] = {}

    def after_switch(self, recorded: Sequence[nn.Module], *, lowest: int) -> list[nn.Module] | None:
        """The order of a step in which block `lowest` is the lowest that trains.

        `recorded` is the order of an earlier step. None where it stands already, or nothing can be said: no step was
        recorded whole, something below the blocks trains, or a block of this structure was never seen.
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
            names = self._within.get((kind, index == lowest)) or self._within.get((kind, index != lowest))
            if names is None:
                return None
            order += [self._modules[index][name] for name in names]
        return order

    def _split(self, recorded: Sequence[nn.Module]) -> tuple[list[nn.Module], list[Names]] | None:
        """Forward and the backward above the blocks; then backward's way through each block, from the last one down."""
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
