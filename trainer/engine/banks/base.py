"""The interface of all banks, and the common base of those that keep state.

A bank stores `Slice`s: full-shape parameter names, this rank's flat range, fp32 master and moments. They depend
neither on the ZeRO stage nor on the layout of the optimizer's groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from trainer.engine.zero.slices import Slice


class Bank(ABC):
    """Keep the optimizer state of blocks while they are frozen. `keeps` is False for a bank that drops it; then
    `redrawn` decides whether a block that is drawn twice in a row keeps its state."""

    keeps = True
    redrawn: Literal["reset", "keep"] | None = None

    @abstractmethod
    def put(self, slices: Sequence[Slice]) -> None:
        """Store `slices`, which leave the optimizer. Their tensors are overwritten afterwards."""

    @abstractmethod
    def holds(self, names: Sequence[str]) -> bool:
        """Return whether all of `names` are stored."""

    @abstractmethod
    def layout(self, names: Sequence[str]) -> tuple[set[str], dict[str, float]]:
        """Return the moments that are stored for `names`, and their common scalars."""

    @abstractmethod
    def take(self, slices: Sequence[Slice]) -> None:
        """Copy what is stored under the slices' names into their tensors, and drop it."""

    def slices(self, names: Collection[str]) -> list[Slice]:
        """Return what is stored of `names`; do not write to it."""
        return []

    def clear(self) -> None:
        """Forget everything."""

    def wait(self) -> None:
        """Make the current stream wait for copies under way."""

    @property
    def num_bytes(self) -> int:
        """Return the bytes stored on this rank."""
        return 0


class KeepingBank(Bank):
    """Keep exact copies of what left the optimizer until it returns, by parameter; a subclass chooses the memory."""

    def __init__(self) -> None:
        self._stored: dict[str, Slice] = {}

    def put(self, slices: Sequence[Slice]) -> None:
        for piece in slices:
            copies = {k: self._copy(v) for k, v in piece.tensors.items()}
            self._stored[piece.name] = replace(piece, tensors=copies, settled=True)

    def holds(self, names: Sequence[str]) -> bool:
        return all(name in self._stored for name in names)

    def layout(self, names: Sequence[str]) -> tuple[set[str], dict[str, float]]:
        pieces = [self._stored[name] for name in names]
        moments = {key for piece in pieces for key in piece.tensors} - {"master"}
        return moments, dict(pieces[0].scalars)

    def take(self, slices: Sequence[Slice]) -> None:
        for piece in slices:
            stored = self._stored.pop(piece.name)
            if (stored.start, stored.stop, stored.shape) != (piece.start, piece.stop, piece.shape):
                raise AssertionError(
                    f"{piece.name}: banked {stored.start}:{stored.stop}, wanted {piece.start}:{piece.stop}"
                )
            for key, value in stored.tensors.items():
                piece.tensors[key].copy_(value, non_blocking=True)

    def slices(self, names: Collection[str]) -> list[Slice]:
        return [piece for name, piece in self._stored.items() if name in names]

    def clear(self) -> None:
        self._stored.clear()

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for piece in self._stored.values() for t in piece.tensors.values())

    @abstractmethod
    def _copy(self, value: Tensor) -> Tensor:
        """Return a copy of `value` [elements] that shares no memory with it."""
