"""Record which block is in which optimizer groups. Independent of DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trainer.model.blocks import Block, BlockError, decays
from trainer.updates import UpdateRule

# Name of the only parameter of DeepSpeed's optimizer if the update rule trains everything else itself.
PLACEHOLDER = "strata_placeholder"


class Slots:
    """The optimizer's groups, whose number and order never change.

    A slot is the groups of one active block: one for parameters with weight decay and one for the others, if every
    block has both. The groups of always-on parts, split likewise, follow the slots. `members[slot]` is a block's index.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        always_on: Mapping[str, Mapping[str, nn.Parameter]],
        update: UpdateRule,
        members: Sequence[int],
    ) -> None:
        """Raise `BlockError` if some blocks lack parameters with, or without, weight decay that others have."""
        self.members = list(members)
        self._blocks = blocks
        self._always_on = always_on
        self._update = update
        self._decay_classes = self._find_decay_classes()
        self.placeholder = self._make_placeholder()

    @property
    def active(self) -> tuple[int, ...]:
        """Return the indices of the blocks in the slots, ascending."""
        return tuple(sorted(self.members))

    def group_indices(self, slot: int) -> range:
        """Return the indices of a slot's groups among all groups."""
        size = len(self._decay_classes)
        return range(slot * size, (slot + 1) * size)

    def groups(self) -> list[dict[str, nn.Parameter]]:
        """Return what the optimizer contains now, by group, in the order of `param_groups`."""
        of_blocks = [group for index in self.members for group in self.groups_of(index)]
        return of_blocks + [group for _, _, group in self._always_on_groups()]

    def groups_of(self, index: int) -> list[dict[str, nn.Parameter]]:
        """Return the groups of block `index` when it is in a slot."""
        parameters = self._in_optimizer(index)
        return [{n: p for n, p in parameters.items() if decays(p) == decayed} for decayed in self._decay_classes]

    def param_groups(
        self, *, lr: float | None, weight_decay: float, lr_always_on: float | None
    ) -> list[dict[str, Any]]:
        """See `Sparse.param_groups`."""
        groups = []
        for (label, decayed), parameters in zip(self._labels(), self.groups(), strict=True):
            group: dict[str, Any] = {
                "params": list(parameters.values()),
                "weight_decay": weight_decay if decayed else 0.0,
            }
            rate = lr if label.startswith("slot") or lr_always_on is None else lr_always_on
            if rate is not None:
                group["lr"] = rate
            groups.append(group | {"name": label})
        return groups

    @property
    def hold_blocks(self) -> bool:
        """Return whether any group belongs to a block; if not, the update rule trains all blocks."""
        return any(label.startswith("slot") for label, _ in self._labels())

    def trainable(self) -> list[nn.Parameter]:
        """Return all parameters that train now, in the optimizer or by the update rule."""
        active = [p for index in self.members for p in self._blocks[index].parameters.values()]
        return active + [p for part in self._always_on.values() for p in part.values()]

    def ever_in_optimizer(self) -> list[nn.Parameter]:
        """Return all parameters that DeepSpeed's optimizer may ever contain."""
        if self.placeholder is not None:
            return [self.placeholder]
        blocks = [p for block in self._blocks for p in self._in_optimizer(block.index).values()]
        return blocks + [p for part in self._always_on.values() for p in part.values()]

    def trained_by_rule(self, indices: Iterable[int] | None = None) -> dict[str, nn.Parameter]:
        """Return what the update rule trains itself if blocks `indices` are active (default: those in the slots)."""
        return trained_by_rule(
            self._blocks, self._always_on, self._update, self.members if indices is None else indices
        )

    def of_rule(self, indices: Iterable[int]) -> dict[str, nn.Parameter]:
        """Return the parameters of the blocks `indices` that the update rule trains outside the optimizer."""
        return _of_rule(self._blocks, self._update, indices)

    def _in_optimizer(self, index: int) -> dict[str, nn.Parameter]:
        block = self._blocks[index]
        names = self._update.in_optimizer(block)
        return {name: p for name, p in block.parameters.items() if name in names}

    def _find_decay_classes(self) -> tuple[bool, ...]:
        """Return the decay classes (True: decayed) of every block, without empty ones: DeepSpeed drops empty groups."""
        by_block = {
            tuple(sorted({decays(p) for p in self._in_optimizer(block.index).values()}, reverse=True))
            for block in self._blocks
        }
        if len(by_block) != 1:
            raise BlockError(
                "blocks differ in whether the optimizer trains matrices, vectors or both, so they cannot take turns in "
                "its groups: use another model, or adapters of one kind in all blocks"
            )
        return by_block.pop()

    def _always_on_groups(self) -> list[tuple[str, bool, dict[str, nn.Parameter]]]:
        if self.placeholder is not None:
            return [(PLACEHOLDER, False, {PLACEHOLDER: self.placeholder})]
        groups = []
        for part, parameters in self._always_on.items():
            for decayed in (True, False):
                chosen = {n: p for n, p in parameters.items() if decays(p) == decayed}
                if chosen:
                    groups.append((part, decayed, chosen))
        return groups

    def _labels(self) -> list[tuple[str, bool]]:
        slots = [(f"slot{slot}", decayed) for slot in range(len(self.members)) for decayed in self._decay_classes]
        return slots + [(part, decayed) for part, decayed, _ in self._always_on_groups()]

    def _make_placeholder(self) -> nn.Parameter | None:
        """Make the parameter that DeepSpeed's optimizer contains if the update rule trains everything itself. It takes
        no part in the model, so it has no gradient and stays zero."""
        if not self._update.whole_model:
            return None
        like = next(iter(self._blocks[0].parameters.values()))
        return nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))


def trained_by_rule(
    blocks: Sequence[Block],
    always_on: Mapping[str, Mapping[str, nn.Parameter]],
    update: UpdateRule,
    indices: Iterable[int],
) -> dict[str, nn.Parameter]:
    """Return the parameters that `update` trains outside the optimizer if the blocks `indices` are active."""
    parameters = _of_rule(blocks, update, indices)
    if update.whole_model:
        parameters |= {name: p for part in always_on.values() for name, p in part.items()}
    return parameters


def _of_rule(blocks: Sequence[Block], update: UpdateRule, indices: Iterable[int]) -> dict[str, nn.Parameter]:
    chosen = [blocks[index] for index in indices]
    return {n: p for b in chosen for n, p in b.parameters.items() if n not in update.in_optimizer(b)}
