"""ZeRO-3: weights, gradients and optimizer state in partitions (DeepSpeed's `runtime/zero/stage3.py`)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import count_used_parameters_in_backward
from deepspeed.runtime.zero.linear import zero3_linear_wrap  # noqa: F401 - for `trainer.planner.tracing`
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, ZeRoTraceMode
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import get_z3_leaf_modules
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from trainer.engine.zero.errors import RegistrationError
from trainer.engine.zero.parameters import GroupMaster, PartitionedParameter
from trainer.engine.zero.private_names import READ_IN_VERSION
from trainer.engine.zero.registration import Registration
from trainer.engine.zero.shares import Shares
from trainer.engine.zero.slices import exchange_storage, own_copy
from trainer.engine.zero.stage3_offload import StateOffload, view_into
from trainer.model.ownership import part


class Stage3(Registration[PartitionedParameter]):
    """ZeRO-3: each parameter is partitioned separately; a group's flat buffer concatenates this rank's partitions."""

    stage = "stage 3"

    def __init__(self, engine: DeepSpeedEngine, groups: Sequence[Mapping[str, PartitionedParameter]]) -> None:
        super().__init__(engine, groups)
        self.shares = PartitionedShares(self.optimizer)
        self._own_storage_per_group()
        register_external_parameters(engine.module)
        self._hooks: list[list[Any]] = [[] for _ in self.groups]
        self._reduces_leaves = True
        self._take_over_hooks()
        states = StateOffload(engine, self.optimizer)
        self.optimizer.offload_states, self.optimizer.reload_states = states.offload, states.reload

    def _check_supported(self) -> None:
        if self.optimizer.params_in_nvme_and_cpu:
            raise RegistrationError("offload_param.device=nvme cannot be switched: use cpu or none")
        self._release_cache = self._find_release_cache()
        if self._release_cache is None:
            raise RegistrationError(
                f"DeepSpeed {deepspeed.__version__} keeps its release cache elsewhere: "
                f"install deepspeed=={READ_IN_VERSION}"
            )

    def registered(self) -> list[list[PartitionedParameter]]:
        return self.optimizer.fp16_groups

    @contextmanager
    def resident(self, index: int) -> Iterator[bool]:
        swapped = self.optimizer._swappable_optimizer_subgroup(index)  # its state is on NVMe
        if swapped:
            self.optimizer._optimizer_states_and_gradient_swap_in(index)
        try:
            yield swapped
        finally:
            if swapped:
                self.optimizer._optimizer_states_and_gradient_swap_out(index)

    def _master(self, index: int) -> GroupMaster:
        return self.optimizer.fp32_partitioned_groups_flat[index]

    def _gradients(self) -> list[Tensor]:
        return [self.optimizer.grad_partitions_flat_buffer]

    def _ranges(self, index: int) -> list[tuple[int, int, int]]:
        ranges, offset = [], 0
        for parameter in self.groups[index].values():
            ranges.append((offset, *_bounds(parameter)))
            offset += parameter.partition_numel()
        return ranges

    def _own_storage_per_group(self) -> None:
        """Give each group a buffer of its own, so that it can be replaced; DeepSpeed stores all groups in one.

        fp32 weights also become their own masters here. DeepSpeed keeps an equal copy, because its test for that
        compares a torch.device with a string and is never true (stage3.py 0.19.8, `_create_fp32_partitions`).
        """
        zero = self.optimizer
        for index, flat in enumerate(zero.fp16_partitioned_groups_flat):
            own, master = cast(GroupMaster, own_copy(flat.detach())), self._master(index)
            if (own.dtype, own.device) == (master.dtype, master.device) and not zero.offload_optimizer:
                own.requires_grad_(True)
                own.ds_id = master.ds_id
                if master in zero.optimizer.state:
                    zero.optimizer.state[own] = zero.optimizer.state.pop(master)
                zero.fp32_partitioned_groups_flat[index] = own
            zero.fp16_partitioned_groups_flat[index] = own
            view_into(own, zero.fp16_groups[index])
        zero.lp_param_buffer = None
        zero.param_groups_fp16_flat_cpu_memory.clear()  # used with offload_param

    def _exchange(self, index: int, leaving: list[PartitionedParameter], entering: list[PartitionedParameter]) -> None:
        zero = self.optimizer
        if any(p.ds_status is ZeroParamStatus.INFLIGHT for p in (*leaving, *entering)):
            zero._partition_all_parameters()  # an evaluation's last prefetch still reads the partitions
        # On one rank a gathered parameter is a view of its partition, and must follow it to its new storage.
        gathered_views = [
            p
            for p in (*leaving, *entering)
            if p.ds_status is ZeroParamStatus.AVAILABLE and p.data_ptr() == p.ds_tensor.data_ptr()
        ]
        sizes = [p.partition_numel() for p in entering]
        if sizes == [p.partition_numel() for p in leaving]:
            flat, offset = zero.fp16_partitioned_groups_flat[index].detach(), 0
            for old, new, size in zip(leaving, entering, sizes, strict=True):
                exchange_storage(old.ds_tensor, new.ds_tensor, flat.narrow(0, offset, size))
                offset += size
        else:
            self._replace_buffers(index, leaving, entering)
        for parameter in gathered_views:
            parameter.data = parameter.ds_tensor.data.view(parameter.ds_shape)
        zero.fp16_groups[index][:] = entering
        zero.fp16_partitioned_groups[index][:] = [p.ds_tensor for p in entering]
        zero.fp16_partitioned_groups_flat_numel[index] = sum(sizes)
        zero.fp16_partitioned_groups_flat_id[index] = [p.ds_id for p in entering]
        is_last_rank = (
            dist.get_rank(group=entering[0].ds_process_group)
            == dist.get_world_size(group=entering[0].ds_process_group) - 1
        )
        zero.groups_padding[index] = [p.padding_size() if is_last_rank else 0 for p in entering]
        self._masters_from_weights(index)
        if not zero.swap_optimizer:  # the swapper finds the group's files by its first id
            self._master(index).ds_id = f"{entering[0].ds_id}_{entering[-1].ds_id}"
        self._track_gradients(index, leaving, entering)
        self._hook_group(index)
        _let_gathers_wait(self.optimizer)

    def _masters_from_weights(self, index: int) -> None:
        master, weights = self._master(index), self.optimizer.fp16_partitioned_groups_flat[index]
        if master is not weights:
            master.data.copy_(weights.data)

    def _replace_buffers(
        self, index: int, leaving: list[PartitionedParameter], entering: list[PartitionedParameter]
    ) -> None:
        """Allocate new buffers for a block whose parameters differ in size from those of the leaving one."""
        zero = self.optimizer
        if zero.swap_optimizer:
            raise RegistrationError(
                "offload_optimizer.device=nvme stores one file for each slot, and this model's blocks differ in shape: "
                "use cpu or none"
            )
        for parameter in leaving:
            parameter.ds_tensor.data = own_copy(parameter.ds_tensor.data)
        old_flat, old_master = zero.fp16_partitioned_groups_flat[index], self._master(index)
        zero.optimizer.state.pop(old_master, None)
        flat = torch.cat([p.ds_tensor.data.view(-1) for p in entering])
        flat = flat.pin_memory() if old_flat.is_pinned() else flat
        view_into(flat, entering)
        zero.fp16_partitioned_groups_flat[index] = flat
        if old_master is old_flat:
            master = flat
        else:
            master = torch.empty(flat.numel(), dtype=old_master.dtype, device=old_master.device)
            if old_master.is_pinned():
                master = master.pin_memory()
        master.requires_grad_(True)
        if zero.offload_optimizer:  # DeepSpeed accumulates into this gradient
            master.grad = torch.zeros_like(master, requires_grad=False)
        zero.fp32_partitioned_groups_flat[index] = master

    def _track_gradients(
        self, index: int, leaving: list[PartitionedParameter], entering: list[PartitionedParameter]
    ) -> None:
        zero = self.optimizer
        partitions = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        old_views = [partitions.pop(p.ds_id) for p in leaving]
        for parameter in leaving:
            for table in (zero.param_dict, zero.params_already_reduced, zero.grad_position):
                table.pop(zero.get_param_id(parameter))
        offset = 0
        for parameter in entering:
            key, size = zero.get_param_id(parameter), parameter.partition_numel()
            zero.param_dict[key] = parameter
            zero.params_already_reduced[key] = False
            zero.grad_position[key] = [index, offset, size]
            offset += size
        if [v.numel() for v in old_views] == [p.partition_numel() for p in entering]:
            for parameter, view in zip(entering, old_views, strict=True):
                partitions[parameter.ds_id] = view.zero_()
            return
        del old_views
        # The buffer contains the gradients of all groups: free the old one before allocating the new one.
        registered = [p for group in zero.fp16_groups for p in group]
        old = zero.grad_partitions_flat_buffer
        dtype, device, pinned = old.dtype, old.device, old.is_pinned()
        partitions.clear()
        del old
        zero.grad_partitions_flat_buffer = None
        buffer = torch.zeros(sum(p.partition_numel() for p in registered), dtype=dtype, device=device)
        zero.grad_partitions_flat_buffer = buffer.pin_memory() if pinned else buffer
        offset = 0
        for parameter in registered:
            partitions[parameter.ds_id] = zero.grad_partitions_flat_buffer.narrow(
                0, offset, parameter.partition_numel()
            )
            offset += parameter.partition_numel()

    # DeepSpeed's own gradient hooks close over the list of parameters that it saw at start-up. These do the same
    # work for the parameters that are registered now (`create_reduce_and_remove_grad_hooks`, stage3.py 0.19.8).

    def _take_over_hooks(self) -> None:
        zero = self.optimizer
        for handle in (*zero._grad_acc_hooks, *zero._leaf_module_hooks):
            handle.remove()
        zero._leaf_module_hooks.clear()
        for module in get_z3_leaf_modules(self.engine.module):
            zero._leaf_module_hooks.append(module.register_full_backward_hook(self._reduce_leaf))
        for index in range(len(self.groups)):
            self._hook_group(index)

    def _hook_group(self, index: int) -> None:
        for handle in self._hooks[index]:
            handle.remove()
        # Leaf modules (experts) reduce all their parameters at once, when the module's backward is done.
        self._hooks[index] = [
            p.register_post_accumulate_grad_hook(self._reduce)
            for p in self.optimizer.fp16_groups[index]
            if not hasattr(p, "ds_z3_leaf_module")
        ]
        self.optimizer._grad_acc_hooks[:] = [handle for handles in self._hooks for handle in handles]

    def _reduce(self, parameter: PartitionedParameter) -> None:
        self._reduce_all([parameter])

    def _reduce_leaf(self, module: nn.Module, grad_input: object, grad_output: object) -> None:
        if not self._reduces_leaves:
            return
        active = [p for g in self.optimizer.fp16_groups for p in g if getattr(p, "ds_z3_leaf_module", None) is module]
        for parameter in active:
            if parameter.grad is None:  # an expert without tokens in this micro-batch
                parameter.grad = torch.zeros_like(parameter)
        if active:
            self._reduce_all(active)

    def _reduce_all(self, parameters: list[PartitionedParameter]) -> None:
        zero = self.optimizer
        refresh = zero.should_refresh_expected_hook_count()
        zero.reenter_backward_if_needed()
        for parameter in parameters:
            if id(parameter) not in self._received and zero.micro_step_id > 0:
                # DeepSpeed adds to this buffer, which still contains the gradient of an earlier step.
                self._gradient(parameter).zero_()
            self._received[id(parameter)] = zero.micro_step_id
            zero.reduce_ready_partitions_and_remove_grads(parameter)
        zero.update_hook_state_and_maybe_run_epilogue(
            self._num_expected_hooks() if refresh else zero._max_expected_hooks_seen
        )

    def _gradient(self, parameter: PartitionedParameter) -> Tensor:
        """Return this rank's part of a registered parameter's gradient, including padding."""
        return self.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[parameter.ds_id]

    def before_step(self) -> None:
        zero = self.optimizer
        gradients: dict[int, list[Tensor]] = {}  # by group whose state is on NVMe, and their offsets there
        offsets: dict[int, list[int]] = {}
        for parameter in (parameter for group in zero.fp16_groups for parameter in group):
            last_micro_step = self._received.get(id(parameter))
            if last_micro_step == zero.micro_step_id:
                continue
            if last_micro_step is None:
                self._gradient(parameter).zero_()
            numel = self.shares.local_shard(parameter).numel()
            if zero.offload_optimizer and numel:  # DeepSpeed offloads only what the last micro-batch gave a gradient
                own = self._gradient(parameter).narrow(0, 0, numel)
                zero._offload_grad_partition_at_boundary(parameter, own, gradients, offsets)
        if gradients:
            zero._swap_out_offload_fp32_gradients(gradients, offsets)
        super().before_step()

    def _num_expected_hooks(self) -> int:
        """Return how many hooks this backward will run: one for each parameter in use, and one for each leaf module."""
        registered = [p for group in self.optimizer.fp16_groups for p in group]
        plain = [p for p in registered if not hasattr(p, "ds_z3_leaf_module")]
        leaves = {id(p.ds_z3_leaf_module) for p in registered if hasattr(p, "ds_z3_leaf_module")}
        return count_used_parameters_in_backward(plain) + len(leaves)

    # ZeRO-3's trace for prefetching (`PartitionedParameterCoordinator`, partitioned_param_coordinator.py 0.19.8).

    def fetch_order(self) -> list[nn.Module]:
        return list(self._coordinator._PartitionedParameterCoordinator__submodule_order)

    def expect_fetch_order(self, order: Sequence[nn.Module]) -> None:
        """Record `order` as if it had just run; the next forward compares it between ranks and completes it."""
        coordinator = self._coordinator
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        self._release_cache.cache_clear()  # it remembers what each position of the old order released
        if not order:  # no step was recorded yet: let DeepSpeed record the next one
            return
        coordinator._PartitionedParameterCoordinator__trace_mode = ZeRoTraceMode.RECORD
        for position, module in enumerate(order):
            coordinator._PartitionedParameterCoordinator__step_id = position
            coordinator.record_module(module)

    @contextmanager
    def inspection(self) -> Iterator[None]:
        self._reduces_leaves = False  # these hooks run in every backward, even if no leaf module gets gradients
        try:
            with super().inspection():
                yield
        finally:
            self._reduces_leaves = True
        self._coordinator.release_backward_leftovers()
        self.optimizer._partition_all_parameters()

    def _find_release_cache(self) -> Any:
        """Find the lru_cache of the coordinator's `__params_to_release`, which another decorator wraps. It caches what
        to release at each position of the trace."""
        decorated = type(self._coordinator)._PartitionedParameterCoordinator__params_to_release
        inside = [decorated, *inspect.getclosurevars(decorated).nonlocals.values()]
        return next((function for function in inside if hasattr(function, "cache_clear")), None)

    @property
    def _coordinator(self) -> PartitionedParameterCoordinator:
        return self.optimizer.parameter_offload.get_param_coordinator()

    # A rebuild keeps ZeRO-3's parameter_offload: its module hooks and its fetch trace know nothing of groups, and a
    # second set of hooks breaks recomputation under activation checkpointing (0.19.8).

    def dispose(self) -> None:
        zero = self.optimizer
        self._offload = zero.parameter_offload
        for handle in (*zero._grad_acc_hooks, *zero._leaf_module_hooks):
            handle.remove()
        zero.ipg_buckets.clear()
        zero.__dict__.clear()

    def build(self) -> None:
        with mock.patch.object(DeepSpeedZeroOptimizer_Stage3, "initialize_ds_offload", lambda *_, **__: self._offload):
            super().build()
        del self._offload

    def own_storage(self, parameters: Iterable[PartitionedParameter]) -> None:
        for parameter in parameters:
            parameter.ds_tensor.data = own_copy(parameter.ds_tensor.data)


def register_external_parameters(model: nn.Module) -> None:
    """Tell ZeRO-3 which parameters PEFT's wrappers of single parameters (`target_parameters`) read outside the modules
    that own them.

    While its base module runs, a wrapper replaces the module's parameter, so that the module fetches less than ZeRO-3
    has recorded. The wrapper also reads weights of LoRA modules without calling these modules, which ZeRO-3 notices
    only when one is not gathered. Training would stop with a tracing error at the first step in which prefetching does
    not hide this.
    """
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            for parameter in (module.get_param(), *module.lora_A.parameters(), *module.lora_B.parameters()):
                deepspeed.zero.register_external_parameter(module, parameter)
            deepspeed.zero.register_external_parameter(module.get_base_layer(), module.get_param())


class PartitionedShares(Shares[PartitionedParameter]):
    """Use each rank's partition of a parameter, without padding, as its share."""

    def __init__(self, zero: DeepSpeedZeroOptimizer_Stage3) -> None:
        self._zero = zero

    def local_shard(self, parameter: PartitionedParameter) -> Tensor:
        start, stop = _bounds(parameter)
        return parameter.ds_tensor.data.view(-1)[: stop - start]  # the last ranks' partitions end in padding

    def owned_range(self, parameter: PartitionedParameter) -> Tensor:
        return self.local_shard(parameter)

    def publish(self, parameter: PartitionedParameter) -> None:
        _let_gathers_wait(self._zero)
        if parameter.ds_status is ZeroParamStatus.INFLIGHT:  # a prefetch that an evaluation left unfinished
            self._zero._partition_all_parameters()
        if parameter.ds_status is ZeroParamStatus.AVAILABLE:
            parameter.partition()  # the gathered copy is out of date
        # So is hpZ's copy on this node, from which every gather would read. Drop it last: if there is none, `partition`
        # makes one from the gathered copy.
        parameter.ds_secondary_tensor = None

    def publish_entries(self, entries: Sequence[tuple[PartitionedParameter, Tensor]]) -> None:
        for parameter, _ in entries:
            self.publish(parameter)


def _bounds(parameter: PartitionedParameter) -> tuple[int, int]:
    """Return the range [start, stop) of the flat parameter that this rank's partition contains."""
    rank = dist.get_rank(group=parameter.ds_process_group)
    return part(parameter.ds_numel, parameter.partition_numel(), rank)


def _let_gathers_wait(zero: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Make ZeRO-3's gather stream wait for what the current stream writes to partitions.

    DeepSpeed gathers on a stream of its own, which waits for nothing (`__all_gather_params`, 0.19.8): without this,
    a gather could read a partition before the weights written to it have arrived.
    """
    accelerator = get_accelerator()
    if not accelerator.is_synchronized_device():
        coordinator = zero.parameter_offload.get_param_coordinator()
        stream = coordinator._PartitionedParameterCoordinator__allgather_stream
        stream.wait_stream(accelerator.current_stream())
