"""ZeRO-1 and 2: optimizer state, and gradients, in partitions (DeepSpeed's `runtime/zero/stage_1_and_2.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import count_used_parameters_in_backward
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import link_hp_params
from torch import Tensor

from trainer.engine.zero.errors import RegistrationError
from trainer.engine.zero.parameters import ReplicatedParameter
from trainer.engine.zero.registration import Registration
from trainer.engine.zero.shares import SharesOfWholes
from trainer.engine.zero.slices import exchange_storage


class Stage1And2(Registration[ReplicatedParameter]):
    """ZeRO-1 and 2: a group's weights are one replicated flat buffer, cut into one range per rank."""

    stage = "stage 1 or 2"
    shares = SharesOfWholes[ReplicatedParameter]()

    def __init__(self, engine: DeepSpeedEngine, groups: Sequence[Mapping[str, ReplicatedParameter]]) -> None:
        super().__init__(engine, groups)
        self._hooks: list[list[Any]] = [[] for _ in self.groups]
        # DeepSpeed's parameter ids of a group that its current block, with fewer parameters than others, does not need.
        self._spare_ids: list[list[int]] = [[] for _ in self.groups]
        # DeepSpeed installs gradient hooks only for some settings; without them it reduces before the optimizer step.
        self._uses_hooks = bool(self.optimizer._grad_acc_hooks)
        for handle in self.optimizer._grad_acc_hooks:
            handle.remove()
        for index in range(len(self.groups)):
            self._hook_group(index)

    def _check_supported(self) -> None:
        if self.optimizer.round_robin_gradients:
            raise RegistrationError("zero_optimization.round_robin_gradients=true cannot be switched: set it to false")
        if self.optimizer.has_moe_layers:
            raise RegistrationError(
                "DeepSpeed's own MoE layers cannot be switched: use a transformers mixture-of-experts model"
            )

    def expect_no_gradients(self) -> None:
        # DeepSpeed's epilogue of backward assumes that the first gradient has allocated the bucket (0.19.8).
        self.optimizer.setup_buckets()

    def registered(self) -> list[list[ReplicatedParameter]]:
        return self.optimizer.bit16_groups

    def _master(self, index: int) -> Tensor:
        return self.optimizer.single_partition_of_fp32_groups[index]

    def _rank(self, index: int) -> int:
        return dist.get_rank(group=self.optimizer.real_dp_process_group[index])

    def _ranges(self, index: int) -> list[tuple[int, int, int]]:
        zero = self.optimizer
        size = int(zero.partition_size[index])
        begin = self._rank(index) * size  # of this rank's partition
        ranges = []
        for parameter, offset in zip(zero.bit16_groups[index], zero.round_robin_bit16_offsets[index], strict=True):
            start = min(max(begin - offset, 0), parameter.numel())
            stop = max(start, min(begin + size - offset, parameter.numel()))
            ranges.append((min(max(offset + start - begin, 0), size), start, stop))
        return ranges

    def _exchange(self, index: int, leaving: list[ReplicatedParameter], entering: list[ReplicatedParameter]) -> None:
        zero = self.optimizer
        same_shapes = [p.shape for p in leaving] == [p.shape for p in entering]
        # Reuse the ids of the leaving block; add ids if the entering block has more parameters.
        ids = [zero.param_id.pop(id(p)) for p in leaving] + self._spare_ids[index]
        ids += range(len(zero.params_already_reduced), len(zero.params_already_reduced) + len(entering) - len(ids))
        zero.params_already_reduced += [False] * (max(ids) + 1 - len(zero.params_already_reduced))
        self._spare_ids[index] = ids[len(entering) :]
        for position, (parameter, key) in enumerate(zip(entering, ids, strict=False)):
            zero.param_id[id(parameter)] = key
            zero.param_dict[key] = parameter
            parameter.param_idx_in_group = position
            parameter.grad_accum = None
        zero.bit16_groups[index] = list(entering)
        zero.round_robin_bit16_groups[index] = zero.bit16_groups[index]
        if same_shapes:
            flat = zero.bit16_groups_flat[index].detach()
            for old, new, offset in zip(leaving, entering, zero.round_robin_bit16_offsets[index], strict=True):
                exchange_storage(old, new, flat.narrow(0, offset, new.numel()).view(new.shape))
        else:
            self._replace_buffers(index, leaving, entering, ids)
        size, rank = int(zero.partition_size[index]), self._rank(index)
        inside, outside, zero.first_offset[index] = zero.get_partition_info(
            zero.round_robin_bit16_groups[index], size, rank, zero.round_robin_bit16_padding[index]
        )
        zero.params_in_partition[index], zero.params_not_in_partition[index] = inside, outside
        for parameters, flag in ((inside, True), (outside, False)):
            for parameter in parameters:
                zero.is_param_in_current_partition[zero.get_param_id(parameter)] = flag
        if not same_shapes:
            self._replan_gradients(index, ids)
        self._masters_from_weights(index)
        self._link(index, leaving)
        self._hook_group(index)

    def _masters_from_weights(self, index: int) -> None:
        weights = self.optimizer.parallel_partitioned_bit16_groups[index][self._rank(index)]
        self._master(index).data.copy_(weights.data)

    def _replace_buffers(
        self, index: int, leaving: list[ReplicatedParameter], entering: list[ReplicatedParameter], ids: list[int]
    ) -> None:
        """Allocate buffers in a new layout, for a block of other shapes, as DeepSpeed's __init__ does."""
        zero = self.optimizer
        for parameter in leaving:
            parameter.data = parameter.data.clone()
        ranks = dist.get_world_size(group=zero.real_dp_process_group[index])
        multiple = _param_alignment(zero, entering[0])
        padding, offsets, end = [], [], 0
        for position, parameter in enumerate(entering):
            offsets.append(end)
            end += parameter.numel()
            pad = 0 if position == len(entering) - 1 else -end % multiple
            padding.append(pad)
            end += pad
        zero.round_robin_bit16_indices[index] = list(range(len(entering)))
        zero.round_robin_bit16_meta[index] = [torch.zeros_like(p.data, device="meta") for p in entering]
        zero.round_robin_bit16_padding[index] = padding
        zero.round_robin_bit16_offsets[index] = offsets
        old = self._master(index)
        zero.optimizer.state.pop(old, None)
        flat = zero.flatten_dense_tensors_aligned(
            entering, zero.nccl_start_alignment_factor * ranks, use_cpu_data=False, param_padding=padding
        ).detach()
        zero.bit16_groups_flat[index] = flat
        zero._update_model_bit16_weights(index)
        partitions = zero.get_data_parallel_partitions(flat, index)
        zero.parallel_partitioned_bit16_groups[index] = partitions
        size = flat.numel() // ranks
        zero.partition_size[index] = size
        begin = self._rank(index) * size
        zero.groups_padding[index] = min(size, max(0, begin + size - end))
        master = torch.empty(size, dtype=old.dtype, device=old.device)
        master = master.pin_memory() if old.is_pinned() else master
        zero.single_partition_of_fp32_groups[index] = master.requires_grad_(True)
        zero.optimizer.param_groups[index]["params"] = [master]
        if zero.cpu_offload:
            master.grad = torch.zeros_like(master, requires_grad=False)
            zero.param_buffer_of_bit16_for_cpu_offload_groups[index] = torch.zeros(
                size, dtype=flat.dtype, device=old.device
            )

    def _replan_gradients(self, index: int, ids: list[int]) -> None:
        """Recompute DeepSpeed's gradient bookkeeping for the group's new layout."""
        zero = self.optimizer
        zero.initialize_gradient_partitioning_data_structures()
        zero.reset_partition_gradient_structures()
        if not zero.cpu_offload:
            return
        for key in ids:
            zero.accumulated_grads_in_cpu.pop(key, None)
            zero.grad_position.pop(key, None)
        zero.get_grad_position(
            index, zero.params_in_partition[index], zero.first_offset[index], zero.partition_size[index]
        )
        largest = max(p.numel() for p in zero.bit16_groups[index])
        for name in ("temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload"):
            buffer = getattr(zero, name)
            if buffer.numel() < largest:
                setattr(zero, name, torch.zeros(largest, dtype=buffer.dtype, device=buffer.device))
        zero._get_offload_gradient_dict()

    def _link(self, index: int, leaving: list[ReplicatedParameter]) -> None:
        """Keep DeepSpeed's public `safe_get_full_*` functions correct for the registered parameters."""
        zero = self.optimizer
        for parameter in leaving:
            parameter._hp_mapping = None
        size = int(zero.partition_size[index])
        padded = any(zero.round_robin_bit16_padding[index])
        link_hp_params(
            lp_param_list=zero.bit16_groups[index],
            flat_hp_partition=self._master(index),
            gradient_dict=zero.averaged_gradients,
            offload_gradient_dict=zero.offload_gradient_dict,
            use_offload=zero.cpu_offload,
            param_group_index=index,
            partition_start=self._rank(index) * size,
            partition_size=size,
            dp_group=zero.real_dp_process_group[index],
            param_offsets=list(zero.round_robin_bit16_offsets[index]) if padded else None,
        )
        linked = [p for p in zero.bit16_groups[index] if p._hp_mapping is not None]
        zero._param_slice_mappings[index] = {
            zero.param_names[p]: p._hp_mapping.get_hp_fragment_address() for p in linked
        }
        zero._hp_optimizer_states_linked = False
        if zero.cpu_offload:
            for parameter in linked:
                parameter._zero_optimizer = zero

    # As in stage 3: DeepSpeed's hooks close over what it saw at start-up (`create_gradient_handling_hooks`, 0.19.8).

    def _hook_group(self, index: int) -> None:
        for handle in self._hooks[index]:
            handle.remove()
        hook = partial(self._reduce, index=index) if self._uses_hooks else self._record_gradient
        self._hooks[index] = [p.register_post_accumulate_grad_hook(hook) for p in self.optimizer.bit16_groups[index]]
        self.optimizer._grad_acc_hooks[:] = [handle for handles in self._hooks for handle in handles]

    def _record_gradient(self, parameter: ReplicatedParameter) -> None:
        """Record that a parameter got a gradient."""
        zero = self.optimizer
        if self._uses_hooks:
            zero.setup_buckets()  # also counts micro-batches: once, at the first gradient of each
        if zero.cpu_offload and id(parameter) not in self._received and zero.micro_step_id > 0:
            sums = zero.accumulated_grads_in_cpu.get(zero.get_param_id(parameter))
            if sums is not None:  # DeepSpeed adds to them, and they are still those of an earlier step
                sums.zero_()
        self._received[id(parameter)] = zero.micro_step_id

    def before_step(self) -> None:
        zero = self.optimizer
        if zero.cpu_offload:  # otherwise DeepSpeed uses zeros itself
            for index, parameters in enumerate(zero.params_in_partition):
                for parameter in parameters:
                    last_micro_step = self._received.get(id(parameter))
                    if last_micro_step is None:
                        _, _, begin, numel = zero.grad_position[zero.get_param_id(parameter)]
                        gradient = self._master(index).grad
                        assert gradient is not None  # with offload_optimizer every master has one
                        gradient.view(-1).narrow(0, begin, numel).zero_()
                    elif last_micro_step != zero.micro_step_id and self._uses_hooks:
                        self._copy_earlier_sum(parameter)
        super().before_step()

    def _copy_earlier_sum(self, parameter: ReplicatedParameter) -> None:
        """Copy a gradient sum that was complete before the last micro-batch to the optimizer's fp32 gradient; DeepSpeed
        copies only those to which the last one added (`_finalize_cpu_offload_gradient_accumulation`, 0.19.8)."""
        zero = self.optimizer
        zero._restore_cpu_offload_grad_to_gpu(parameter)
        zero.set_norm_for_param_grad_in_gpu(parameter)
        zero.update_offload_overflow_tracker_for_param_grad(parameter)
        zero.async_inplace_copy_grad_to_fp32_buffer_from_gpu(parameter)

    def _reduce(self, parameter: ReplicatedParameter, *, index: int) -> None:
        zero = self.optimizer
        self._record_gradient(parameter)
        refresh = zero.should_refresh_expected_hook_count()
        zero.reenter_backward_if_needed()
        zero.process_gradients(parameter, index)
        registered = [p for group in zero.bit16_groups for p in group] if refresh else []
        expected = count_used_parameters_in_backward(registered) if refresh else zero._max_expected_hooks_seen
        zero.update_hook_state_and_maybe_run_epilogue(expected)

    def own_storage(self, parameters: Iterable[ReplicatedParameter]) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.clone()


def _param_alignment(zero: DeepSpeedZeroOptimizer, parameter: Tensor) -> int:
    return 16 // parameter.element_size() if zero.parameter_alignment else 1
