"""The bank in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from trainer.engine.banks.base import KeepingBank
from trainer.engine.zero.slices import Slice


class Cpu(KeepingBank):
    """Keep master weights and moments in host memory (page-locked if there is a GPU) and restore them exactly.

    Takes at most 12 bytes for each inactive parameter that was ever active (beyond that, torch's page-locked allocator
    rounds each tensor up to a power of two). On a GPU, copies in run on a stream of their own, in parallel to
    the next forward and backward, and `wait` orders the optimizer step after them; copies out must end before the
    buffers that they read are filled again. DeepSpeed's throughput timer waits for the device before every forward, and
    so for the copies: Strata's own runs disable it ("timers": {"throughput": {"enabled": false}} in DeepSpeed's JSON).
    """

    def __init__(self) -> None:
        super().__init__()
        # One per direction: a switch copies groups out and in by turns, and waits for copies out at once.
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
        """Run copies on the stream of the direction `way`, after everything queued on the current stream so far."""
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
