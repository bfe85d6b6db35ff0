"""Move blocks into and out of the optimizer's groups, and their state with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from trainer.engine.banks import Bank
from trainer.engine.rounding import RoundingLoss
from trainer.engine.slots import Slots
from trainer.engine.zero.registration import Registration
from trainer.engine.zero.slices import Slice
from trainer.model.blocks import Block


class StateSource(Protocol):
    """A store of fp32 master weights and moments, read parameter by parameter."""

    def has_state(self, names: Sequence[str]) -> bool:
        """Return whether the store contains master weights for all of `names`."""

    def layout(self, names: Sequence[str]) -> tuple[set[str], dict[str, float]]:
        """Return which moments are stored for `names`, the parameters of one group, and their common scalars, such as
        the step count."""

    def load(self, slices: Sequence[Slice]) -> None:
        """Fill the tensors of `slices` with the stored values of their ranges."""

    def entries(self, name: str) -> dict[str, torch.Tensor]:
        """Return all ranks' `indices` and values if a sparse update rule trains the parameter `name`, else {}."""


class Switcher:
    """Change which block is in which slot, and what its groups contain."""

    def __init__(self, registration: Registration, bank: Bank, slots: Slots, blocks: Sequence[Block]) -> None:
        self._registration = registration
        self._bank = bank
        self._slots = slots
        self._blocks = blocks
        self._rounding: RoundingLoss | None = None
        self.measure_rounding()

    def switch(self, drawn: Sequence[int], *, reset: bool) -> list[int]:
        """Put the blocks `drawn` into the slots. Returns those that were in a slot already.

        A block that stays keeps its slot. With `reset` its optimizer state is reset, otherwise it is kept.
        """
        members = self._slots.members
        entering = [index for index in drawn if index not in members]
        staying = [index for index in members if index in drawn]
        for slot, index in enumerate(members):
            if index not in drawn:
                self._replace(slot, entering.pop(0))
            elif reset:
                self._reset(slot)
        if self._rounding is not None:
            self._rounding.finish()
        return staying

    def restore(self, members: Sequence[int], source: StateSource) -> None:
        """Put the blocks `members` into the slots, in this order, and load their state and the bank's from `source`.

        The order matters: rounding makes sums over groups depend on the order of their tensors.
        """
        if self._bank.keeps:
            self._bank.clear()  # left over from before the resume; no longer valid
            self._fill_bank(members, source)
        self._arrange(members)
        for group_index, group in enumerate(self._slots.groups()):
            self._load_group(group_index, group, source)

    def measure_rounding(self) -> None:
        """Start to measure what switches lose by dropping master weights, unless weights are as precise as these."""
        dtype = next(iter(self._blocks[0].parameters.values())).dtype
        if self._bank.keeps or dtype is torch.float32:
            return
        rounding = RoundingLoss(dtype)
        for slot in range(len(self._slots.members)):
            for group_index in self._slots.group_indices(slot):
                with self._registration.resident(group_index):
                    rounding.enter(group_index, self._registration.masters(group_index))
        self._rounding = rounding

    @property
    def rounded_away(self) -> float | None:
        """See `Sparse.rounded_away`."""
        return None if self._rounding is None else self._rounding.share

    @rounded_away.setter
    def rounded_away(self, share: float | None) -> None:
        if self._rounding is not None:
            self._rounding.share = share

    def _replace(self, slot: int, index: int) -> None:
        """Bank the state of the block in `slot`, put block `index` there, and restore its state from the bank."""
        registration, bank = self._registration, self._bank
        self._slots.members[slot] = index
        for group_index, parameters in self._indexed_groups(slot, index):
            with registration.resident(group_index):
                if bank.keeps:
                    bank.put(registration.slices(group_index))
                with self._measuring_rounding(group_index):
                    registration.refill(group_index, parameters)
                if bank.holds(list(parameters)):
                    registration.materialise_state(group_index, *bank.layout(list(parameters)))
                    bank.take(registration.slices(group_index))

    def _reset(self, slot: int) -> None:
        for group_index in self._slots.group_indices(slot):
            with self._registration.resident(group_index), self._measuring_rounding(group_index):
                self._registration.reset(group_index)

    @contextmanager
    def _measuring_rounding(self, group_index: int) -> Iterator[None]:
        """Measure what a group loses when the `with` block replaces its master weights by copies of its weights."""
        if self._rounding is not None:
            self._rounding.leave(group_index, self._registration.masters(group_index))
        yield
        if self._rounding is not None:
            self._rounding.enter(group_index, self._registration.masters(group_index))

    def _fill_bank(self, members: Sequence[int], source: StateSource) -> None:
        """Load each block outside `members` into a slot and bank it from there, so that banked slices have the layout
        of a slot."""
        for block in self._blocks:
            groups = self._slots.groups_of(block.index)
            names = [name for group in groups for name in group]
            if block.index in members or not source.has_state(names):
                continue
            current = self._slots.members
            slot = current.index(block.index) if block.index in current else 0
            self._move(slot, block.index)
            for group_index, group in self._indexed_groups(slot, block.index):
                self._load_group(group_index, group, source)
                with self._registration.resident(group_index):
                    self._bank.put(self._registration.slices(group_index))

    def _arrange(self, members: Sequence[int]) -> None:
        """Move every block into its slot. If blocks occupy each other's slots, one of them is first replaced by a block
        outside `members`, which leaves again."""
        current = self._slots.members
        while current != list(members):
            free = [slot for slot, index in enumerate(members) if index not in current]
            if free:
                self._move(free[0], members[free[0]])
            else:
                wrong = next(slot for slot, index in enumerate(members) if current[slot] != index)
                self._move(wrong, next(block.index for block in self._blocks if block.index not in current))

    def _move(self, slot: int, index: int) -> None:
        """Put block `index` into a slot with fresh state, and drop the state of the block that leaves."""
        if self._slots.members[slot] == index:
            return
        for group_index, parameters in self._indexed_groups(slot, index):
            with self._registration.resident(group_index):
                self._registration.refill(group_index, parameters)
        self._slots.members[slot] = index

    def _load_group(self, group_index: int, group: Mapping[str, nn.Parameter], source: StateSource) -> None:
        registration = self._registration
        with registration.resident(group_index):
            registration.forget_state(group_index)  # left over from before the resume; no longer valid
            registration.materialise_state(group_index, *source.layout(list(group)))
            source.load(registration.slices(group_index))

    def _indexed_groups(self, slot: int, index: int) -> Iterator[tuple[int, dict[str, nn.Parameter]]]:
        return zip(self._slots.group_indices(slot), self._slots.groups_of(index), strict=True)
