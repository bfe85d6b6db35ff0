"""Types of parameters and buffers with the attributes that DeepSpeed adds to them, for the type checker alone.

DeepSpeed sets these attributes on plain parameters and tensors, so no object is an instance of these classes. They were
read in DeepSpeed 0.19.8 (`runtime/zero/partition_parameters.py`, `runtime/zero/stage3.py`,
`runtime/zero/parameter_offload.py`, `runtime/zero/stage_1_and_2.py`, `utils/mixed_precision_linkage.py`).
"""

from __future__ import annotations

from typing import Any, TypeVar

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

P = TypeVar("P", bound=nn.Parameter)


class PartitionedParameter(nn.Parameter):
    """A parameter under ZeRO-3 (`Init._convert_to_deepspeed_param`)."""

    ds_id: int
    ds_numel: int  # of the full parameter, as `ds_shape`
    ds_shape: tuple[int, ...]
    ds_tensor: Tensor  # this rank's partition, 1-D, with padding
    ds_secondary_tensor: Tensor | None  # hpZ's copy of the partition on this node
    ds_status: ZeroParamStatus
    ds_process_group: Any
    ds_z3_leaf_module: nn.Module  # set only on the parameters of leaf modules

    def partition(self) -> None:
        """Free the gathered copy."""

    def partition_numel(self) -> int:  # type: ignore[empty-body] # a declaration
        """Return the number of elements of each rank's partition, with padding."""

    def padding_size(self) -> int:  # type: ignore[empty-body] # a declaration
        """Return the number of elements by which the partitions exceed the parameter."""


class ReplicatedParameter(nn.Parameter):
    """A parameter under ZeRO-1 and 2."""

    param_idx_in_group: int
    grad_accum: Tensor | None
    _hp_mapping: Any  # where its fp32 master weights and moments are, for `safe_get_full_*`
    _zero_optimizer: Any  # set only with offload_optimizer


class GroupMaster(Tensor):
    """A flat fp32 master under ZeRO-3."""

    ds_id: str  # the first and the last parameter's, by which the swapper to NVMe names its files
