"""Copies in host memory of what is about to change, made beside training."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

# Bytes. A power of two, which torch's page-locked allocator would round up to.
_CHUNK = 2**28
_ALIGNMENT = 64


@dataclass
class _Copy:
    """`numel` elements from the first of `source` on, whether or not they are all its own, to where `target` begins."""

    source: Tensor
    target: Tensor
    numel: int

    def make(self) -> None:
        whole = self.target.as_strided((self.numel,), (1,))
        whole.copy_(self.source.as_strided((self.numel,), (1,)), non_blocking=True)


class Staging:
    """Host memory that one save after another copies into; on a GPU's host page-locked, so that copies run at full
    speed. Allocating it anew for each save would cost more than the copy.

    What is given to `place` must stay as it is until `join` returns. Between steps weights and optimizer state do, so
    copies run beside the next forward and backward (as in https://arxiv.org/abs/2406.10707).
    """

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._copies: list[_Copy] = []
        self._stream: Any = None
        self._done = threading.Event()
        self._done.set()

    def place(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Where each of `tensors`, flat, will be on the host. What was copied before is lost."""
        self.join()
        targets, self._copies = self._lay_out([tensor.detach().reshape(-1).contiguous() for tensor in tensors])
        return targets

    def order(self) -> None:
        """Copies come after what the device was given so far. In the thread that gave it; `run` or `abandon` follow."""
        accelerator = get_accelerator()
        if not accelerator.is_synchronized_device():
            if self._stream is None:
                self._stream = accelerator.Stream()
            self._stream.wait_stream(accelerator.current_stream())
        self._done.clear()

    def abandon(self) -> None:
        """Nothing is copied after all."""
        self._copies = []
        self._done.set()

    def run(self) -> None:
        """Copy everything, in any thread."""
        try:
            if self._stream is not None:  # a thread begins on the first device, and would take memory there
                get_accelerator().set_device(self._stream.device_index)
            with nullcontext() if self._stream is None else get_accelerator().stream(self._stream):
                for copy in self._copies:
                    copy.make()
                if self._stream is not None:
                    self._stream.synchronize()
        finally:
            self.abandon()  # what is copied needs its source no more

    def join(self) -> None:
        """Return when copying has ended, well or not."""
        self._done.wait()

    def _lay_out(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[_Copy]]:
        """A place for each tensor, and what to copy: tensors that lie side by side in memory, as the parts of an
        optimizer's flat buffers do, go side by side and as one."""
        targets = [torch.empty(0)] * len(tensors)
        copies: list[_Copy] = []
        left = sum(tensor.nbytes + _ALIGNMENT for tensor in tensors)
        number, used, last = 0, 0, None
        for index in sorted(range(len(tensors)), key=lambda index: tensors[index].data_ptr()):
            tensor = tensors[index]
            follows = last is not None and _follows(last, tensor)
            begin = used if follows else -(-used // _ALIGNMENT) * _ALIGNMENT
            if number < len(self._chunks) and begin + tensor.nbytes > self._chunks[number].numel() and begin:
                number, begin, follows = number + 1, 0, False
            self._make_room(number, tensor.nbytes, max(tensor.nbytes, min(_CHUNK, left)))
            used, left, last = begin + tensor.nbytes, left - tensor.nbytes, tensor
            targets[index] = self._chunks[number][begin:used].view(tensor.dtype)
            if follows:
                copies[-1].numel += tensor.numel()
            else:
                copies.append(_Copy(tensor, targets[index], tensor.numel()))
        return targets, copies

    def _make_room(self, number: int, least: int, size: int) -> None:
        """Chunk `number` has at least `least` bytes, or else `size`."""
        if number < len(self._chunks) and self._chunks[number].numel() >= least:
            return
        pinned = get_accelerator().device_name() != "cpu"
        self._chunks[number : number + 1] = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned)]


def _follows(last: Tensor, tensor: Tensor) -> bool:
    same = tensor.dtype == last.dtype and tensor.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
    return same and tensor.data_ptr() == last.data_ptr() + last.nbytes
