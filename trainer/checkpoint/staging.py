"""Copy what is about to change into host memory, alongside training."""

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
    """Copy `numel` elements, from the first of `source` on and possibly past its end, to where `target` begins."""

    source: Tensor
    target: Tensor
    numel: int

    def make(self) -> None:
        whole = self.target.as_strided((self.numel,), (1,))
        whole.copy_(self.source.as_strided((self.numel,), (1,)), non_blocking=True)


class Staging:
    """Host memory that all saves copy into, since allocating it for each would cost more than the copy. For a GPU it is
    page-locked, so that copies run at full speed.

    What is given to `lay_out` must not change until `join` returns. Weights and optimizer state do not change between
    steps, so copies run alongside the next forward and backward (as in https://arxiv.org/abs/2406.10707).
    """

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._copies: list[_Copy] = []
        self._stream: Any = None
        self._done = threading.Event()
        self._done.set()

    def lay_out(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return where each of `tensors`, flat, will be on the host. Earlier copies are overwritten."""
        self.join()
        targets, self._copies = self._targets([tensor.detach().reshape(-1).contiguous() for tensor in tensors])
        return targets

    def order(self) -> None:
        """Let copies wait for the device's work so far. Call it in the thread that queued that work; `run` or `abandon`
        must follow."""
        accelerator = get_accelerator()
        if not accelerator.is_synchronized_device():
            if self._stream is None:
                self._stream = accelerator.Stream()
            self._stream.wait_stream(accelerator.current_stream())
        self._done.clear()

    def abandon(self) -> None:
        """Discard the copies to make."""
        self._copies = []
        self._done.set()

    def run(self) -> None:
        """Make all copies; any thread may do so."""
        try:
            if self._stream is not None:  # a new thread would allocate memory on the first device
                get_accelerator().set_device(self._stream.device_index)
            with nullcontext() if self._stream is None else get_accelerator().stream(self._stream):
                for copy in self._copies:
                    copy.make()
                if self._stream is not None:
                    self._stream.synchronize()
        finally:
            self.abandon()  # copies no longer need their sources

    def join(self) -> None:
        """Wait until copying has ended, successfully or not."""
        self._done.wait()

    def _targets(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[_Copy]]:
        """Return a place for each tensor, and the copies to make. Tensors that are adjacent in memory, such as parts of
        an optimizer's flat buffers, stay adjacent and are copied as one."""
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
        """Replace chunk `number` by one of `size` bytes if it has fewer than `least`."""
        if number < len(self._chunks) and self._chunks[number].numel() >= least:
            return
        pinned = get_accelerator().device_name() != "cpu"
        self._chunks[number : number + 1] = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned)]


def _follows(last: Tensor, tensor: Tensor) -> bool:
    same = tensor.dtype == last.dtype and tensor.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
    return same and tensor.data_ptr() == last.data_ptr() + last.nbytes
