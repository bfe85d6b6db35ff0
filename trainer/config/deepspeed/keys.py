"""List the keys of a DeepSpeed configuration, as deepspeed 0.19.8 reads them, and those that Strata refuses.

They are listed because importing deepspeed imports torch, and configuration is checked before that.
tests/config/test_deepspeed_keys.py compares every table with the installed DeepSpeed.
"""

TOP_LEVEL = (
    "activation_checkpointing",
    "aio",
    "autotuning",
    "bf16",
    "bfloat16",
    "checkpoint",
    "comet",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "data_efficiency",
    "data_types",
    "dataloader_drop_last",
    "datastates_ckpt",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "expert_parallel",
    "flops_profiler",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_allreduce_op",
    "gradient_clipping",
    "gradient_predivide_factor",
    "hybrid_engine",
    "log_level",
    "managed_gradient_accumulation",
    "memory_breakdown",
    "optimizer",
    "pipeline",
    "prescale_gradients",
    "scheduler",
    "seq_parallel_communication_data_type",
    "steps_per_print",
    "tensor_parallel",
    "tensorboard",
    "timers",
    "torch_autocast",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism",
    "vocabulary_size",
    "wall_clock_breakdown",
    "wandb",
    "weight_quantization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)

# Field of DeepSpeedZeroConfig -> its alias in JSON; both spellings are read.
ZERO_ALIASES = {
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "param_persistence_threshold": "stage3_param_persistence_threshold",
    "model_persistence_threshold": "stage3_model_persistence_threshold",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
    "gather_16bit_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "module_granularity_threshold": "stage3_module_granularity_threshold",
    "use_all_reduce_for_fetch_params": "stage3_use_all_reduce_for_fetch_params",
    "allgather_sequential": "stage3_allgather_sequential",
}

ZERO_COUNTS = (  # integers >= 0, or "auto"
    "reduce_bucket_size",
    "allgather_bucket_size",
    "sub_group_size",
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "module_granularity_threshold",
    "zero_hpz_partition_size",
)

COUNTS = (  # integers >= 1 that DeepSpeed itself checks only when it computes with them
    "steps_per_print",
    "aio.block_size",
    "aio.queue_depth",
    "aio.intra_op_parallelism",
)

ZERO_FLAGS = (  # true, false or "auto"
    "contiguous_gradients",
    "reduce_scatter",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "overlap_comm",
    "compute_grad_norm",
    "load_from_fp32_weights",
    "elastic_checkpoint",
    "cpu_offload_param",
    "cpu_offload_use_pin_memory",
    "cpu_offload",
    "gather_16bit_weights_on_model_save",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
    "stage3_gather_fp16_weights_on_model_save",
    "ignore_unused_parameters",
    "legacy_stage1",
    "round_robin_gradients",
    "parameter_alignment",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "memory_efficient_linear",
    "pipeline_loading_checkpoint",
    "override_module_apply",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
    "save_muon_momentum_buffer_in_memory",
)

ZERO_OTHER = ("stage", "offload_param", "offload_optimizer", "zenflow", "leaf_module")

ZERO = (*ZERO_OTHER, *ZERO_COUNTS, *ZERO_FLAGS, *ZERO_ALIASES.values())

OFFLOAD_OPTIMIZER = (
    "device",
    "nvme_path",
    "buffer_count",
    "pin_memory",
    "pipeline_read",
    "pipeline_write",
    "fast_init",
    "ratio",
    "super_offload",
    "cpuadam_cores_perc",
)

BF16 = (
    "enabled",
    "immediate_grad_update",
    "check_grad_overflow",
    "bf16_master_weights_and_grads",
    "bf16_optimizer_states",
)

DATA_TYPES = ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules")

TENSORBOARD = ("enabled", "output_path", "job_name")

# Blocks whose keys are checked, by dotted path.
BLOCKS = {
    "": TOP_LEVEL,
    "zero_optimization": ZERO,
    "zero_optimization.offload_optimizer": OFFLOAD_OPTIMIZER,
    "bf16": BF16,
    "data_types": DATA_TYPES,
    "tensorboard": TENSORBOARD,
}

# Dotted path -> (values that mean "off", why anything else is refused). A missing key is off.
_UNTESTED = "it changes what the ZeRO optimizer partitions, which switching does not handle"
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "optimizer": ((), "Strata builds the optimizer, one group per active block: set optimizer.* of the run"),
    "scheduler": ((), "Strata builds the learning-rate schedule: set schedule.* of the run"),
    "bfloat16": ((), "this is the old name of the block: write bf16"),
    "torch_autocast.enabled": ((False,), "the type of the weights is that of the run: set model.dtype"),
    "managed_gradient_accumulation": ((True,), "the run sets accumulation: set train.global_batch_size"),
    "gradient_allreduce_op": (("mean",), "the loop divides the summed loss itself and expects averaging"),
    "zero_allow_untested_optimizer": ((True,), "Strata brings its own optimizer object, which DeepSpeed would refuse"),
    "bf16.check_grad_overflow": ((True,), "train.max_skipped_steps of the run counts the steps that this check skips"),
    "bf16.bf16_master_weights_and_grads": ((False,), "banks keep fp32 master weights"),
    "bf16.bf16_optimizer_states": ((False,), "banks keep fp32 optimizer state"),
    "hybrid_engine.enabled": ((False,), _UNTESTED),
    "expert_parallel.enabled": ((False,), _UNTESTED),
    "tensor_parallel": ((), _UNTESTED),
    "compile.deepcompile": ((False,), "it compiles one fixed set of trainable parameters"),
    "weight_quantization": ((), "blocks that are frozen now train later and need their exact weights"),
    "zero_optimization.compute_grad_norm": (
        (True,),
        "clipping and train.max_skipped_steps of the run need the norm",
    ),
    "zero_optimization.round_robin_gradients": ((False,), "it reorders the flat partition that banks keep slices of"),
    "zero_optimization.zenflow": ((), _UNTESTED),
    "zero_optimization.elastic_checkpoint": ((False,), "checkpoints are Strata's own"),
    "zero_optimization.legacy_stage1": ((False,), "DeepSpeed has removed it"),
    "zero_optimization.zero_quantized_weights": ((False,), "blocks that train need their exact weights"),
    "zero_optimization.zero_quantized_nontrainable_weights": (
        (False,),
        "frozen blocks of full weights train later and need them exactly; with adapters it is untested",
    ),
    "zero_optimization.zero_quantized_gradients": ((False,), _UNTESTED),
    "zero_optimization.cpu_offload": ((False,), 'deprecated: write "offload_optimizer": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_param": ((False,), 'deprecated: write "offload_param": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_use_pin_memory": ((), 'deprecated: write "offload_optimizer": {"pin_memory": ...}'),
    "zero_optimization.offload_optimizer.ratio": ((1, 1.0), _UNTESTED),
    "zero_optimization.offload_optimizer.super_offload": ((False,), _UNTESTED),
}
