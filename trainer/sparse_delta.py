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

INDICES, VALUES = "indices:", "values:"


class SparseDeltaError(ValueError):
    """These indices and values are not of these weights; the message names the parameter."""


def pack(name: str, weights: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """The tensors of parameter `name`, of whose `weights` those at flat `indices` were trained."""
    indices = indices.to(torch.int64).sort().values
    return {INDICES + name: indices, VALUES + name: weights.detach().reshape(-1)[indices]}


def names(keys: Mapping[str, object]) -> list[str]:
    """The parameters that a delta has indices and values of. Raises `SparseDeltaError` where one half is missing."""
    of_indices = {key.removeprefix(INDICES) for key in keys if key.startswith(INDICES)}
    of_values = {key.removeprefix(VALUES) for key in keys if key.startswith(VALUES)}
    lost = sorted(of_indices ^ of_values)
    if lost:
        missing = VALUES if lost[0] in of_indices else INDICES
        raise SparseDeltaError(f"{lost[0]}: the delta has no {missing}{lost[0]}; it is damaged")
    return sorted(of_indices)


def put(name: str, weights: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """A copy of the base's `weights` with what `pack(name, ...)` kept. Raises `SparseDeltaError`."""
    indices, values = tensors[INDICES + name], tensors[VALUES + name]
    if indices.dtype is not torch.int64 or indices.dim() != 1 or indices.shape != values.shape:
        raise SparseDeltaError(
            f"{name}: {tuple(indices.shape)} indices of {indices.dtype} and {tuple(values.shape)} values; a delta has "
            "as many of both, the indices in int64"
        )
    if values.dtype is not weights.dtype:
        raise SparseDeltaError(f"{name}: the delta's values are {values.dtype}, the base's weights {weights.dtype}")
    if indices.numel():
        ascending = bool((indices.diff() > 0).all())
        if not ascending or int(indices[0]) < 0 or int(indices[-1]) >= weights.numel():
            raise SparseDeltaError(
                f"{name}: the delta's indices run from {int(indices.min())} to {int(indices.max())}"
                f"{'' if ascending else ' and not upwards'}; the base has {weights.numel()} weights there"
            )
    changed = weights.detach().clone()
    changed.view(-1)[indices] = values
    return changed
