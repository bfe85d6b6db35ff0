"""DeepSpeed's private names that this folder uses.

All of them were read in DeepSpeed 0.19.8 (`runtime/zero/stage3.py`, `runtime/zero/stage_1_and_2.py`,
`runtime/base_optimizer.py`, `runtime/zero/parameter_offload.py`, `runtime/zero/partitioned_param_coordinator.py`,
`runtime/fp16/loss_scaler.py`, `runtime/engine.py`, `ops/adam/cpu_adam.py`). `attach` refuses a DeepSpeed in which one
is missing, and `tests/engine/test_registration.py` fails when one moves. Attributes of parameters are in
`parameters.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload

READ_IN_VERSION = "0.19.8"
# Attributes that the switch reads or writes, by the object that has them; `missing_names` finds these.
PRIVATE_NAMES: dict[str, tuple[str, ...]] = {
    "stage 0": (),
    "stage 3": tuple(
        """
        _DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition _grad_acc_hooks _leaf_module_hooks
        _max_expected_hooks_seen _offload_grad_partition_at_boundary _optimizer_states_and_gradient_swap_in
        _optimizer_states_and_gradient_swap_out _partition_all_parameters _swap_out_offload_fp32_gradients
        _swappable_optimizer_subgroup bf16_master_weights_and_gradients dynamic_loss_scale fp16_groups
        fp16_master_weights_and_gradients fp16_partitioned_groups fp16_partitioned_groups_flat
        fp16_partitioned_groups_flat_id fp16_partitioned_groups_flat_numel fp32_partitioned_groups_flat get_param_id
        grad_partitions_flat_buffer grad_position groups_padding initialize_ds_offload ipg_buckets loss_scaler
        micro_step_id offload_optimizer offload_param offloaded_states optimizer param_dict
        param_groups_fp16_flat_cpu_memory parameter_offload params_already_reduced params_in_nvme_and_cpu
        partial_offload reduce_ready_partitions_and_remove_grads reenter_backward_if_needed
        register_grad_acc_post_hook should_refresh_expected_hook_count sub_group_to_group_id swap_optimizer
        update_hook_state_and_maybe_run_epilogue zenflow zero_quantized_nontrainable_weights
        """.split()
    ),
    "stage 1 or 2": tuple(
        """
        _get_offload_gradient_dict _grad_acc_hooks _hp_optimizer_states_linked _max_expected_hooks_seen
        _param_slice_mappings _update_model_bit16_weights averaged_gradients bf16_master_weights_and_gradients
        bit16_groups bit16_groups_flat cpu_offload dynamic_loss_scale first_offset flatten_dense_tensors_aligned
        fp16_master_weights_and_gradients get_data_parallel_partitions get_grad_position get_param_id
        get_partition_info groups_padding has_moe_layers initialize_gradient_partitioning_data_structures
        is_param_in_current_partition loss_scaler micro_step_id nccl_start_alignment_factor offload_gradient_dict
        optimizer parallel_partitioned_bit16_groups param_dict param_id param_names parameter_alignment
        params_already_reduced params_in_partition params_not_in_partition partition_size process_gradients
        real_dp_process_group reenter_backward_if_needed register_grad_acc_post_hook
        reset_partition_gradient_structures round_robin_bit16_groups round_robin_bit16_indices round_robin_bit16_meta
        round_robin_bit16_offsets round_robin_bit16_padding round_robin_gradients setup_buckets
        should_refresh_expected_hook_count single_partition_of_fp32_groups update_hook_state_and_maybe_run_epilogue
        zenflow
        """.split()
    ),
    "stage 3 without offload_param": ("lp_param_buffer",),
    # Stages 1 and 2 with offload_optimizer.
    "offload": tuple(
        """
        _restore_cpu_offload_grad_to_gpu accumulated_grads_in_cpu async_inplace_copy_grad_to_fp32_buffer_from_gpu
        grad_position param_buffer_of_bit16_for_cpu_offload_groups set_norm_for_param_grad_in_gpu
        temp_grad_buffer_for_cpu_offload temp_grad_buffer_for_gpu_offload
        update_offload_overflow_tracker_for_param_grad
        """.split()
    ),
    "engine": ("_backward_post_hook", "_configure_zero_optimizer"),
    # The state of fp16's loss scaler, which checkpoints contain; everything else in it is configuration.
    "dynamic loss scaler": ("cur_hysteresis", "cur_iter", "cur_scale", "last_overflow_iter"),
    "CPU Adam": ("ds_opt_adam", "opt_id"),
    "CPU Adam's library": ("adam_update",),
    "module parameter_offload": ("FWD_MODULE_STACK",),
    "parameter_offload": ("get_param_coordinator",),
    "bucket": ("buffer", "buffer_meta"),
    # Prefetching in stage 3.
    "coordinator": tuple(
        """
        _PartitionedParameterCoordinator__allgather_stream _PartitionedParameterCoordinator__params_to_release
        _PartitionedParameterCoordinator__step_id
        _PartitionedParameterCoordinator__submodule_order _PartitionedParameterCoordinator__trace_mode
        _invalidate_trace is_invalid_trace record_module release_backward_leftovers
        """.split()
    ),
}
# The file through which ranks on one node reduce on the CPU (`csrc/cpu/comm/shm.cpp`); DeepSpeed never removes it.
SHARED_MEMORY = "/dev/shm/deepspeed_allreduce_buffer_{user}_{address}_{port}_{rank}"


def missing_names(engine: DeepSpeedEngine, stage: str) -> list[str]:
    """Return the private names of `stage` that this engine's objects lack."""
    first: dict[str, Any] = {
        "engine": engine,
        stage: engine.optimizer,
        "module parameter_offload": parameter_offload,
    }
    if isinstance(engine.basic_optimizer, DeepSpeedCPUAdam):
        first["CPU Adam"] = engine.basic_optimizer
    # Each object below is an attribute of one above it.
    missing = _missing(first) or _missing(_further(engine, stage))
    if not missing and stage == "stage 3":
        missing = _missing({"coordinator": engine.optimizer.parameter_offload.get_param_coordinator()})
    return missing


def _further(engine: DeepSpeedEngine, stage: str) -> dict[str, Any]:
    """Return the objects that depend on the settings of the engine, by their keys in `PRIVATE_NAMES`."""
    zero, holders = engine.optimizer, dict[str, Any]()
    if isinstance(engine.basic_optimizer, DeepSpeedCPUAdam):
        holders["CPU Adam's library"] = engine.basic_optimizer.ds_opt_adam
    if stage == "stage 1 or 2" and zero.cpu_offload:
        holders["offload"] = zero
    if stage == "stage 3":
        holders["parameter_offload"] = zero.parameter_offload
        for bucket in zero.ipg_buckets.values():
            holders["bucket"] = bucket
        if not zero.offload_param:
            holders["stage 3 without offload_param"] = zero
    if engine.fp16_enabled() and zero.dynamic_loss_scale:
        holders["dynamic loss scaler"] = zero.loss_scaler
    return holders


def _missing(holders: Mapping[str, Any]) -> list[str]:
    return [name for kind, holder in holders.items() for name in PRIVATE_NAMES[kind] if not hasattr(holder, name)]
