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
        """Return whether the store contains masters for all of `names`."""

    def layout(self, names: Sequence[str]) -> tuple[set[str], dict[str, float]]:
        """Return the names of the stored moments, and the common scalars, of `names`: the parameters of one group."""

    def load(self, slices: Sequence[Slice]) -> None:
        """Fill the tensors of `slices` with what the store contains of their ranges."""

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
        self.follow_rounding()

    def switch(self, drawn: Sequence[int], *, renew: bool) -> list[int]:
        """Put the blocks `drawn` into the slots. Returns those that were in a slot already.

        A block that stays keeps its slot. With `renew` its optimizer state starts anew, otherwise it is kept.
        """
        members = self._slots.members
        entering = [index for index in drawn if index not in members]
        staying = [index for index in members if index in drawn]
        for slot, index in enumerate(members):
            if index not in drawn:
                self._replace(slot, entering.pop(0))
            elif renew:
                self._renew(slot)
        if self._rounding is not None:
            self._rounding.finish()
        return staying

    def restore(self, members: Sequence[int], source: StateSource) -> None:
        """Put the blocks `members` into the slots, in this order, and load their state and the bank's from `source`.

        The order matters: sums over groups depend on the order of their tensors.
        """
        if self._bank.keeps:
            self._bank.clear()  # left over from before the resume; no longer valid
            self._fill_bank(members, source)
        self._arrange(members)
        for number, group in enumerate(self._slots.groups()):
            self._load_group(number, group, source)

    def follow_rounding(self) -> None:
        """Begin to measure what switches lose by dropping masters, if these are more precise than the weights."""
        dtype = next(iter(self._blocks[0].parameters.values())).dtype
        if self._bank.keeps or dtype is torch.float32:
            return
        rounding = RoundingLoss(dtype)
        for slot in range(len(self._slots.members)):
            for number in self._slots.numbers(slot):
                with self._registration.resident(number):
                    rounding.enter(number, self._registration.masters(number))
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
        """Bank the state of a slot's block, put block `index` into the slot, and restore its state from the bank."""
        registration, bank = self._registration, self._bank
        self._slots.members[slot] = index
        for number, parameters in self._numbered_groups(slot, index):
            with registration.resident(number):
                if bank.keeps:
                    bank.put(registration.slices(number))
                with self._measuring_rounding(number):
                    registration.refill(number, parameters)
                if bank.holds(list(parameters)):
                    registration.materialise_state(number, *bank.layout(list(parameters)))
                    bank.take(registration.slices(number))

    def _renew(self, slot: int) -> None:
        for number in self._slots.numbers(slot):
            with self._registration.resident(number), self._measuring_rounding(number):
                self._registration.renew(number)

    @contextmanager
    def _measuring_rounding(self, number: int) -> Iterator[None]:
        """Measure what a group loses when its masters are replaced, while inside, by copies of its weights."""
        if self._rounding is not None:
            self._rounding.leave(number, self._registration.masters(number))
        yield
        if self._rounding is not None:
            self._rounding.enter(number, self._registration.masters(number))

    def _fill_bank(self, members: Sequence[int], source: StateSource) -> None:
        """Load each block outside `members` into a slot, then bank it: slices in the bank have a slot's layout."""
        for block in self._blocks:
            groups = self._slots.groups_of(block.index)
            names = [name for group in groups for name in group]
            if block.index in members or not source.has_state(names):
                continue
            current = self._slots.members
            slot = current.index(block.index) if block.index in current else 0
            self._move(slot, block.index)
            for number, group in self._numbered_groups(slot, block.index):
                self._load_group(number, group, source)
                with self._registration.resident(number):
                    self._bank.put(self._registration.slices(number))

    def _arrange(self, members: Sequence[int]) -> None:
        """Move every block into its slot. Blocks that are in each other's slots are moved by way of a block
        that does not train, which takes a slot meanwhile."""
        current = self._slots.members
        while current != list(members):
            free = [slot for slot, index in enumerate(members) if index not in current]
            if free:
                self._move(free[0], members[free[0]])
            else:
                wrong = next(slot for slot, index in enumerate(members) if current[slot] != index)
                self._move(wrong, next(block.index for block in self._blocks if block.index not in current))

    def _move(self, slot: int, index: int) -> None:
        """Put block `index` into a slot with fresh state; the state of the block that leaves is dropped."""
        if self._slots.members[slot] == index:
            return
        for number, parameters in self._numbered_groups(slot, index):
            with self._registration.resident(number):
                self._registration.refill(number, parameters)
        self._slots.members[slot] = index

    def _load_group(self, number: int, group: Mapping[str, nn.Parameter], source: StateSource) -> None:
        registration = self._registration
        with registration.resident(number):
            registration.forget_state(number)  # left over from before the resume; no longer valid
            registration.materialise_state(number, *source.layout(list(group)))
            source.load(registration.slices(number))

    def _numbered_groups(self, slot: int, index: int) -> Iterator[tuple[int, dict[str, nn.Parameter]]]:
        return zip(self._slots.numbers(slot), self._slots.groups_of(index), strict=True)
