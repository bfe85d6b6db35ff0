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
from transformers.integrations import deepspeed as active

from trainer.model.weights import ModelFolder


@torch.no_grad()
def fill(model: PreTrainedModel, folder: ModelFolder) -> None:
    """Fill every parameter and every buffer of `model` from `folder`. Collective.

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
        else:  # every rank stores it whole
            tensor.copy_(folder.read([name])[name])
        tensor._is_hf_initialized = True  # type: ignore[attr-defined] # transformers marks tensors by it
    model.initialize_weights()  # the rest: buffers that no file contains


def stored_tensors(model: PreTrainedModel) -> list[tuple[list[str], Tensor]]:
    """Return what files store of `model`: each parameter and persistent buffer once, with all names that it has."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


@contextmanager
def created_whole() -> Iterator[None]:
    """Let transformers create whole models while inside, also while a ZeRO-3 configuration is active.

    Parts of multimodal models are created by functions that would partition them, with collectives, on whichever rank
    calls them.
    """
    # transformers (5.23) has no public function that returns the object.
    found = active._hf_deepspeed_config_weak_ref
    before = None if found is None else found()
    active.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if before is not None:
            active.set_hf_deepspeed_config(before)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Return freed tensors of 1 MiB and more to the system while inside. Has no effect without glibc.

    glibc keeps freed memory, in pieces of up to 32 MiB, in a heap between partitions that stay, and the next weight
    does not fit into the gaps: loading used up to 1.7 times the live memory (mallopt(3)).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    mmap_threshold, trim_threshold = -3, -1
    if mallopt is not None:
        mallopt(mmap_threshold, 2**20)
    try:
        yield
    finally:
        if mallopt is not None:  # the limits of glibc's own adjustment, which the call above has ended
            mallopt(mmap_threshold, 2**25)
            mallopt(trim_threshold, 2**26)
