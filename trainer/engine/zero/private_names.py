"""DeepSpeed's private names that this folder uses.

All of them were read in DeepSpeed 0.19.8 (`runtime/zero/stage3.py`, `runtime/zero/stage_1_and_2.py`,
`runtime/zero/parameter_offload.py`, `runtime/zero/partitioned_param_coordinator.py`, `runtime/engine.py`). `attach`
refuses a DeepSpeed in which one is missing, and `tests/engine/test_registration.py` fails when one moves.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

READ_IN_VERSION = "0.19.8"
# Attributes that the switch reads or writes, by stage.
PRIVATE_NAMES: dict[str, tuple[str, ...]] = {
    "stage 3": tuple(
        """
        _DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition _grad_acc_hooks _leaf_module_hooks
        _max_expected_hooks_seen _offload_grad_partition_at_boundary _optimizer_states_and_gradient_swap_in
        _optimizer_states_and_gradient_swap_out _partition_all_parameters _swap_out_offload_fp32_gradients
        _swappable_optimizer_subgroup fp16_groups fp16_partitioned_groups fp16_partitioned_groups_flat
        fp16_partitioned_groups_flat_id fp16_partitioned_groups_flat_numel fp32_partitioned_groups_flat get_param_id
        grad_partitions_flat_buffer grad_position groups_padding initialize_ds_offload ipg_buckets micro_step_id
        offload_optimizer offloaded_states optimizer param_dict param_groups_fp16_flat_cpu_memory parameter_offload
        params_already_reduced params_in_nvme_and_cpu reduce_ready_partitions_and_remove_grads
        reenter_backward_if_needed should_refresh_expected_hook_count sub_group_to_group_id swap_optimizer
        update_hook_state_and_maybe_run_epilogue
        """.split()
    ),
    "stage 1 or 2": tuple(
        """
        _get_offload_gradient_dict _grad_acc_hooks _hp_optimizer_states_linked _max_expected_hooks_seen
        _param_slice_mappings _update_model_bit16_weights averaged_gradients bit16_groups bit16_groups_flat
        cpu_offload first_offset flatten_dense_tensors_aligned get_data_parallel_partitions get_grad_position
        get_param_id get_partition_info groups_padding has_moe_layers initialize_gradient_partitioning_data_structures
        is_param_in_current_partition micro_step_id nccl_start_alignment_factor offload_gradient_dict optimizer
        parallel_partitioned_bit16_groups param_dict param_id param_names parameter_alignment params_already_reduced
        params_in_partition params_not_in_partition partition_size process_gradients real_dp_process_group
        reenter_backward_if_needed reset_partition_gradient_structures round_robin_bit16_groups
        round_robin_bit16_indices round_robin_bit16_meta round_robin_bit16_offsets round_robin_bit16_padding
        round_robin_gradients setup_buckets should_refresh_expected_hook_count single_partition_of_fp32_groups
        update_hook_state_and_maybe_run_epilogue
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
# The file through which ranks on one machine reduce on the CPU (`csrc/cpu/comm/shm.cpp`); DeepSpeed never removes it.
SHARED_MEMORY = "/dev/shm/deepspeed_allreduce_buffer_{user}_{address}_{port}_{rank}"


def missing_names(engine: DeepSpeedEngine, stage: str) -> list[str]:
    """Return the private names of `stage` that this engine's objects lack."""
    optimizer = engine.optimizer
    holders: dict[str, Any] = {"engine": engine, stage: optimizer}
    if getattr(optimizer, "cpu_offload", False):
        holders["offload"] = optimizer
    if hasattr(optimizer, "parameter_offload"):
        holders["coordinator"] = optimizer.parameter_offload.get_param_coordinator()
        if not optimizer.offload_param:
            holders["stage 3 without offload_param"] = optimizer
    return [
        name for kind, holder in holders.items() for name in PRIVATE_NAMES.get(kind, ()) if not hasattr(holder, name)
    ]
