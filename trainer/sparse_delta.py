"""The weights that a sparse update rule changed, as indices and values: what a delta holds of them, and putting it on.

For a parameter NAME of which some weights were unmasked, two 1-D tensors of the same length (safetensors):

    indices:NAME    int64, ascending: flat positions in the parameter
    values:NAME     the weights there, in the dtype of training

Everything else is the base's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.shards import ExportError


def keys_of(name: str) -> tuple[str, str]:
    """What the tensors of parameter `name` are called."""
    return f"indices:{name}", f"values:{name}"


def pack(name: str, *, indices: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The tensors of parameter `name`, of which those at flat `indices` were trained and are `weight` now."""
    order = indices.argsort()
    return dict(zip(keys_of(name), (indices[order].to(torch.int64), weight[order]), strict=True))


def put(name: str, weights: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """A copy of the base's `weights` with what `pack(name, ...)` made. Raises `ExportError` where that does not fit."""
    lost = [key for key in keys_of(name) if key not in tensors]
    if lost:
        raise ExportError(f"{name}: the delta has no {lost[0]}; it is damaged")
    indices, values = (tensors[key] for key in keys_of(name))
    if indices.dtype is not torch.int64 or indices.dim() != 1 or indices.shape != values.shape:
        raise ExportError(
            f"{name}: {tuple(indices.shape)} indices of {indices.dtype} and {tuple(values.shape)} values; a delta has "
            "as many of both, the indices in int64"
        )
    if values.dtype is not weights.dtype:
        raise ExportError(f"{name}: the delta's values are {values.dtype}, the base's weights {weights.dtype}")
    if indices.numel():
        ascending = bool((indices.diff() > 0).all())
        if not ascending or int(indices[0]) < 0 or int(indices[-1]) >= weights.numel():
            raise ExportError(
                f"{name}: the delta's indices run from {int(indices.min())} to {int(indices.max())}"
                f"{'' if ascending else ' and not upwards'}; the base has {weights.numel()} weights there"
            )
    changed = weights.detach().clone()
    changed.view(-1)[indices] = values
    return changed
