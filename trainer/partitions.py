"""Fill a model that ZeRO-3 has in partitions, with little more than these in host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed import comm as dist
from deepspeed import zero
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.weights import ModelFolder


@torch.no_grad()
def fill(model: PreTrainedModel, folder: ModelFolder) -> None:
    """Give every parameter and every buffer of `model` what `folder` has for it. Collective.

    Rank 0 reads one parameter at a time, each rank keeps its part. `model` was made under `deepspeed.zero.Init`, its
    weights tied as they are to be; `folder` has at least one name of every tensor in `stored_tensors`.
    """
    for names, tensor in stored_tensors(model):
        name = next(name for name in names if name in folder.shapes)
        if isinstance(tensor, nn.Parameter):
            # Before it is gathered: a conversion needs memory of its own.
            read = folder.read([name], tensor.dtype) if dist.get_rank() == 0 else {}
            with zero.GatheredParameters([tensor], modifier_rank=0):
                if read:
                    tensor.copy_(read.pop(name))
        else:  # every rank holds it whole
            tensor.copy_(folder.read([name])[name])
        tensor._is_hf_initialized = True
    model.initialize_weights()  # what is left: buffers that no file holds


def stored_tensors(model: PreTrainedModel) -> list[tuple[list[str], Tensor]]:
    """What files hold of `model`: each parameter and persistent buffer once, with all names that it has."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


@contextmanager
def freed_at_once() -> Iterator[None]:
    """While inside, tensors of 1 MiB and more that are freed go back to the system; with glibc, elsewhere as ever.

    glibc keeps what is freed, at last up to 32 MiB a piece, in a heap where partitions that stay lie in between, and
    where the next weight finds no room: loading held up to 1.7 times what was alive (mallopt(3)).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    mmap_threshold, trim_threshold = -3, -1
    if mallopt is not None:
        mallopt(mmap_threshold, 2**20)
    try:
        yield
    finally:
        if mallopt is not None:  # where its own adjustment ends, which the call above has ended
            mallopt(mmap_threshold, 2**25)
            mallopt(trim_threshold, 2**26)
