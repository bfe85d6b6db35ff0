"""Ranges of parameters on this rank, and moves of their storage."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor, nn


@dataclass(frozen=True)
class Slice:
    """This rank's part of one registered parameter: the flat range [start, stop) of its full shape.

    `tensors` contains 1-D views of stop - start elements into the live optimizer state: `master` (fp32) and the
    moments. `scalars` contains the values that are not per element (Adam's step count). `shape` is the full shape.
    `settled` says that these tensors are not written to any more, whatever happens to the parameter.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    tensors: dict[str, Tensor]
    scalars: dict[str, float] = field(default_factory=dict)
    settled: bool = False

    def cloned(self) -> Slice:
        """Return the same slice in memory of its own."""
        return replace(self, tensors={key: tensor.clone() for key, tensor in self.tensors.items()}, settled=True)


def stored(parameter: nn.Parameter) -> Tensor:
    """Return what this rank stores of a parameter: its partition under ZeRO-3, all of it otherwise."""
    return getattr(parameter, "ds_tensor", parameter.data)


def exchange_storage(leaving: Tensor, entering: Tensor, place: Tensor) -> None:
    """Move `leaving` from `place` into storage of its own, and `entering` into `place`, which frees its old storage.

    One tensor at a time, so that a switch needs no more than one parameter's worth of extra memory.
    """
    leaving.data = own_copy(place)
    place.copy_(entering.data)
    entering.data = place


def own_copy(tensor: Tensor) -> Tensor:
    """Return a copy, pinned if the original is: offloaded weights are copied to the device again and again."""
    return tensor.clone().pin_memory() if tensor.is_pinned() else tensor.clone()
