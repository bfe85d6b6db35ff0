"""Pack the weights that a sparse update rule changed as indices and values for a delta, and apply them.

A parameter NAME with unmasked weights is stored as two 1-D tensors of the same length (safetensors):

    indices:NAME    int64, ascending: flat positions in the parameter
    values:NAME     the weights there, in the dtype of training

Everything else is the base's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.export.shards import ExportError


def keys_of(name: str) -> tuple[str, str]:
    """Return the names of the two tensors of parameter `name`."""
    return f"indices:{name}", f"values:{name}"


def pack(name: str, *, indices: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Return the tensors of parameter `name`, whose trained weights have the flat `indices` and the values `weight`."""
    order = indices.argsort()
    return dict(zip(keys_of(name), (indices[order].to(torch.int64), weight[order]), strict=True))


def put(name: str, weights: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the base's `weights` with the `tensors` of `pack(name, ...)`. Raises `ExportError` if they do not fit."""
    missing = [key for key in keys_of(name) if key not in tensors]
    if missing:
        raise ExportError(f"{name}: the delta has no {missing[0]}; it is damaged")
    indices, values = (tensors[key] for key in keys_of(name))
    if indices.dtype is not torch.int64 or indices.dim() != 1 or indices.shape != values.shape:
        raise ExportError(
            f"{name}: {tuple(indices.shape)} indices of {indices.dtype} and {tuple(values.shape)} values; allowed: as "
            "many indices as values, in int64"
        )
    if values.dtype is not weights.dtype:
        raise ExportError(f"{name}: the delta's values are {values.dtype}, but the base's weights {weights.dtype}")
    if indices.numel():
        ascending = bool((indices.diff() > 0).all())
        if not ascending or int(indices[0]) < 0 or int(indices[-1]) >= weights.numel():
            raise ExportError(
                f"{name}: the delta's indices run from {int(indices.min())} to {int(indices.max())}"
                f"{'' if ascending else ' and are not ascending'}; the base has {weights.numel()} weights there"
            )
    changed = weights.detach().clone()
    changed.view(-1)[indices] = values
    return changed
