"""Banks: where masters and optimizer state of inactive blocks live.

A bank stores `Slice`s: full-shape parameter names, this rank's flat range, fp32 master and moments. They depend on
neither the ZeRO stage nor on how the optimizer lays out its groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from trainer.engine.registration import Slice


class Bank(ABC):
    """Keeps the optimizer state of blocks while they are frozen; `keeps` is False for a bank that drops it."""

    keeps = True

    @abstractmethod
    def put(self, slices: Sequence[Slice]) -> None:
        """Store what leaves the optimizer. The tensors are overwritten afterwards."""

    @abstractmethod
    def holds(self, names: Sequence[str]) -> bool:
        """Whether all of `names` are stored."""

    @abstractmethod
    def layout(self, names: Sequence[str]) -> tuple[set[str], dict[str, float]]:
        """Which moments are stored for `names`, and their common scalars."""

    @abstractmethod
    def take(self, slices: Sequence[Slice]) -> None:
        """Copy what is stored under the slices' names into their tensors, and forget it."""

    def slices(self, names: Collection[str]) -> list[Slice]:
        """What is stored of `names`; not to be written to."""
        return []

    def clear(self) -> None:
        """Forget everything."""

    def wait(self) -> None:
        """Return when copies under way may be relied upon by the current stream."""

    @property
    def num_bytes(self) -> int:
        """Bytes held on this rank."""
        return 0


class Discard(Bank):
    """Forget: a block starts each interval with fresh moments, and its master from its weights (LISA, BAdam)."""

    keeps = False

    def put(self, slices: Sequence[Slice]) -> None:
        return None

    def holds(self, names: Sequence[str]) -> bool:
        return False

    def layout(self, names: Sequence[str]) -> tuple[set[str], dict[str, float]]:
        return set(), {}

    def take(self, slices: Sequence[Slice]) -> None:
        raise AssertionError("the discard bank holds nothing")


class _Keeping(Bank):
    """Copies of what left, by parameter, until it comes back exactly; a subclass says where they lie."""

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
        """`value` [elements], kept apart from it."""


class Device(_Keeping):
    """Keep masters and moments on the device that they are on, as copies: 12 bytes for each inactive parameter that was
    ever active. For what is small, such as adapters: no transfer to the host.
    """

    def _copy(self, value: Tensor) -> Tensor:
        return value.clone()


class Cpu(_Keeping):
    """Keep masters and moments in host memory (page-locked where there is an accelerator) and bring them back exactly.

    At most 12 bytes for each inactive parameter that was ever active (torch's page-locked allocator rounds each
    tensor up to a power of two beyond that). On an accelerator the way in runs on a stream of its own, beside the next
    forward and backward, and `wait` orders the optimizer step after it; the way out must be over before the buffers
    that it reads are filled again. DeepSpeed's throughput timer waits for the device before every forward, and with it
    for the copies: Strata's own runs switch it off ("timers": {"throughput": {"enabled": false}} in DeepSpeed's JSON).
    """

    def __init__(self) -> None:
        super().__init__()
        # Each way has its own: a switch sends groups out and in by turns, and waits at once for what goes out.
        self._streams: dict[str, Any] = {}

    def put(self, slices: Sequence[Slice]) -> None:
        with self._beside_compute("out"):
            super().put(slices)
        self._let_compute_wait("out")

    def take(self, slices: Sequence[Slice]) -> None:
        with self._beside_compute("in"):
            super().take(slices)

    def wait(self) -> None:
        self._let_compute_wait("in")

    def _copy(self, value: Tensor) -> Tensor:
        pinned = bool(self._streams)
        host = torch.empty(value.numel(), dtype=value.dtype, device="cpu", pin_memory=pinned)
        return host.copy_(value, non_blocking=pinned)

    def _beside_compute(self, way: str) -> AbstractContextManager[Any]:
        """Copies go to the stream of `way`, after what the current stream has been given so far."""
        accelerator = get_accelerator()
        if accelerator.is_synchronized_device():
            return nullcontext()
        if way not in self._streams:  # not before the process has chosen its device
            self._streams[way] = accelerator.Stream()
        self._streams[way].wait_stream(accelerator.current_stream())
        return accelerator.stream(self._streams[way])

    def _let_compute_wait(self, way: str) -> None:
        if way in self._streams:
            get_accelerator().current_stream().wait_stream(self._streams[way])


REGISTRY: dict[str, type[Bank]] = {"discard": Discard, "device": Device, "cpu": Cpu}


def build(name: str) -> Bank:
    """The bank `name`; raises `ValueError` for an unknown name."""
    if name not in REGISTRY:
        raise ValueError(f"bank.name: unknown bank '{name}'; allowed: {', '.join(REGISTRY)}")
    return REGISTRY[name]()
