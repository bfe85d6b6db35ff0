"""`engine.offload_states` and `reload_states` under ZeRO-3.

DeepSpeed's own (stage3.py 0.19.8) rely on one buffer of all weights and on the groups at start-up. These move the same
kinds of state in Strata's layout.
"""

from __future__ import annotations

import gc
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from trainer.engine.zero.parameters import PartitionedParameter


class StateOffload:
    """Move an optimizer's state to the host and back."""

    def __init__(self, engine: DeepSpeedEngine, zero: DeepSpeedZeroOptimizer_Stage3) -> None:
        self._engine, self._zero = engine, zero
        self._moved: dict[OffloadStateTypeEnum, list[Tensor]] = {}

    def offload(
        self,
        include: Container[OffloadStateTypeEnum] | None = None,
        device: OffloadDeviceEnum = OffloadDeviceEnum.cpu,
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        zero, accelerator = self._zero, get_accelerator()
        self._engine.empty_partition_cache()
        for kind in OffloadStateTypeEnum:
            if kind in zero.offloaded_states or (include is not None and kind not in include):
                continue
            here = torch.device(accelerator.current_device_name())
            self._moved[kind] = [tensor for tensor in self._of_kind(kind) if tensor.device == here]
            with self._views_kept():
                for tensor in self._moved[kind]:
                    copy = torch.empty_like(tensor.data, device=device.value)
                    copy = accelerator.pin_memory(copy) if pin_memory else copy
                    tensor.data = copy.copy_(tensor.data, non_blocking=non_blocking)
            if kind is OffloadStateTypeEnum.contiguous_grad_buffer:
                for bucket in zero.ipg_buckets.values():
                    if bucket.buffer is not None:  # empty between steps: its shape is enough
                        bucket.buffer_meta, bucket.buffer = bucket.buffer.to("meta"), None
            zero.offloaded_states.add(kind)
        if non_blocking:
            accelerator.synchronize()
        gc.collect()
        accelerator.empty_cache()

    def reload(self, non_blocking: bool = False) -> None:
        zero, accelerator = self._zero, get_accelerator()
        here = accelerator.current_device_name()
        sources: list[Tensor] = []  # a copy that does not block reads them until the end
        for kind in list(zero.offloaded_states):
            with self._views_kept():
                for tensor in self._moved.pop(kind):
                    sources.append(tensor.data)
                    tensor.data = torch.empty_like(tensor.data, device=here).copy_(
                        tensor.data, non_blocking=non_blocking
                    )
            if kind is OffloadStateTypeEnum.contiguous_grad_buffer:
                for bucket in zero.ipg_buckets.values():
                    if bucket.buffer is None and bucket.buffer_meta is not None:
                        bucket.buffer = torch.empty_like(bucket.buffer_meta, device=here)
            zero.offloaded_states.remove(kind)
        if non_blocking:
            accelerator.synchronize()

    def _of_kind(self, kind: OffloadStateTypeEnum) -> list[Tensor]:
        """Return the tensors that own the storage of a kind of state."""
        zero = self._zero
        flats = zero.fp16_partitioned_groups_flat
        if kind is OffloadStateTypeEnum.hp_params:  # fp32 weights are their own masters, and move as weights
            return [m for m, flat in zip(zero.fp32_partitioned_groups_flat, flats, strict=True) if m is not flat]
        if kind is OffloadStateTypeEnum.lp_params:
            registered = {p.ds_id for group in zero.fp16_groups for p in group}
            return flats + [p.ds_tensor for p in self._engine.module.parameters() if p.ds_id not in registered]
        if kind is OffloadStateTypeEnum.lp_grads:
            return [zero.grad_partitions_flat_buffer]
        if kind is OffloadStateTypeEnum.optim_states:
            return [v for state in zero.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return []

    @contextmanager
    def _views_kept(self) -> Iterator[None]:
        """Restore the views of buffers that move to other storage inside."""
        zero = self._zero
        # On one rank a gathered parameter is a view of its partition.
        gathered = [
            p
            for p in self._engine.module.parameters()
            if p.ds_status is ZeroParamStatus.AVAILABLE and p.data_ptr() == p.ds_tensor.data_ptr()
        ]
        yield
        for flat, group in zip(zero.fp16_partitioned_groups_flat, zero.fp16_groups, strict=True):
            view_into(flat, group)
        for parameter in gathered:
            parameter.data = parameter.ds_tensor.data.view(parameter.ds_shape)
        partitions, offset = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition, 0
        for parameter in (p for group in zero.fp16_groups for p in group):
            # In place: gradients that were averaged already are these tensors.
            size = parameter.partition_numel()
            partitions[parameter.ds_id].data = zero.grad_partitions_flat_buffer.narrow(0, offset, size)
            offset += size


def view_into(flat: Tensor, parameters: Iterable[PartitionedParameter]) -> None:
    """Make the partitions of `parameters` views of `flat`, one after the other."""
    offset = 0
    for parameter in parameters:
        size = parameter.partition_numel()
        parameter.ds_tensor.data = flat.detach().narrow(0, offset, size)
        offset += size
