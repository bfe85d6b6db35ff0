"""Fill a DeepSpeed configuration from the run, and refuse what contradicts it."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.deepspeed.checks import auto_problems, refused, type_problems, zero_problems
from trainer.config.deepspeed.presets import file_name, read
from trainer.config.deepspeed.values import AUTO, assign
from trainer.config.errors import ConfigError
from trainer.config.run_size import Batch, resolve_batch
from trainer.config.schema import RunConfig
from trainer.config.text import whole_number
from trainer.settings.nested import get

# DeepSpeed prints a line every `steps_per_print` steps; the loop has its own bar.
_NEVER = 10**9


@dataclass(frozen=True)
class _Fill:
    """A DeepSpeed key whose value follows from the run; `run_key` is what a user would change instead."""

    key: str
    value: Any
    run_key: str
    run_value: Any


def resolve(config: RunConfig, ranks: int, *, local_ranks: int | None = None) -> dict[str, Any]:
    """Return the dictionary for `deepspeed.initialize`, except for the sizes that `size_buckets` adds.

    `local_ranks` is the number of ranks on each node, by default the launcher's. Missing keys and "auto" are filled
    from the run. Raises ConfigError with every value that contradicts the run or that Strata does not support.
    """
    values = read(config.deepspeed)
    source = file_name(config.deepspeed)
    problems = refused(values, source) + zero_problems(values, config, source) + type_problems(values, config, source)
    fills = _run_fills(config)
    try:
        fills += _batch_fills(resolve_batch(config, ranks))
    except ConfigError as error:
        problems += error.problems
    for fill in fills:
        found = get(values, fill.key, AUTO)
        if found != AUTO and (found != fill.value or isinstance(found, bool) != isinstance(fill.value, bool)):
            problems.append(
                f"deepspeed: {fill.key} is {json.dumps(found)} in {source} but {fill.run_key} is {fill.run_value}: "
                f'change one of them, or write "auto" in {source}'
            )
        assign(values, fill.key, fill.value)
    for key, value in [*_defaults(config, values), *_of_the_nodes(config, values, ranks, local_ranks)]:
        if get(values, key, AUTO) == AUTO:
            assign(values, key, value)
    problems += auto_problems(values, source)
    if problems:
        raise ConfigError(problems)
    return values


def _run_fills(config: RunConfig) -> list[_Fill]:
    clipping, dtype = config.train.gradient_clipping, config.model.dtype
    return [
        # DeepSpeed 0.19.8 clips at 1.0 if this is missing.
        _Fill("gradient_clipping", clipping, "train.gradient_clipping", clipping),
        _Fill("bf16.enabled", dtype == "bf16", "model.dtype", dtype),
        _Fill("fp16.enabled", dtype == "fp16", "model.dtype", dtype),
    ]


def _batch_fills(batch: Batch) -> list[_Fill]:
    total, micro, accumulation = batch.global_batch_size, batch.micro_batch_size, batch.accumulation_steps
    quotient = f"train.global_batch_size / ({batch.ranks} ranks x train.micro_batch_size)"
    return [
        _Fill("train_batch_size", total, "train.global_batch_size", total),
        _Fill("train_micro_batch_size_per_gpu", micro, "train.micro_batch_size", micro),
        _Fill("gradient_accumulation_steps", accumulation, quotient, accumulation),
    ]


def _defaults(config: RunConfig, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return (key, value) pairs that the run decides if the JSON does not."""
    defaults: list[tuple[str, Any]] = [
        ("steps_per_print", _NEVER),
        ("wall_clock_breakdown", False),
        # It waits for the device before every forward, and so for blocks that the bank copies back meanwhile.
        ("timers.throughput.enabled", False),
        ("zero_allow_untested_optimizer", True),
        ("bf16.check_grad_overflow", True),
        # Also DeepSpeed's own default; for fp32 accumulation of bf16 see `type_problems`.
        ("data_types.grad_accum_dtype", config.model.dtype),
        ("zero_optimization.contiguous_gradients", True),
        ("zero_optimization.round_robin_gradients", False),
        # DeepSpeed's own choice: on for stage 3 only.
        ("zero_optimization.overlap_comm", get(values, "zero_optimization.stage") == 3),
    ]
    if config.model.dtype == "fp16":
        # Dynamic scaling that halves on every overflow; DeepSpeed's hysteresis 2 waits for a second one.
        defaults += [("fp16.loss_scale", 0), ("fp16.initial_scale_power", 16), ("fp16.hysteresis", 1)]
    if config.monitor.tensorboard:
        defaults += [
            ("tensorboard.enabled", True),
            ("tensorboard.output_path", str(Path(config.output).expanduser() / "tensorboard")),
            ("tensorboard.job_name", "strata"),
        ]
    elif get(values, "tensorboard.enabled") == AUTO:
        defaults.append(("tensorboard.enabled", False))
    return defaults


def _of_the_nodes(
    config: RunConfig, values: Mapping[str, Any], ranks: int, local_ranks: int | None
) -> list[tuple[str, Any]]:
    """Return (key, value) pairs that depend on the nodes, for keys that are "auto"."""
    values_there: list[tuple[str, Any]] = []
    if get(values, "zero_optimization.zero_hpz_partition_size") == AUTO:
        # torchrun sets LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE.
        launched = (whole_number(os.environ.get(name)) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
        named = local_ranks or next(filter(None, launched), 1)
        # On a single node a second copy of the weights would save nothing.
        values_there.append(("zero_optimization.zero_hpz_partition_size", named if named < ranks else 1))
    if get(values, "zero_optimization.offload_optimizer.nvme_path") == AUTO:
        # A run creates its own folder there, as in any other path (trainer/run/swap_folder.py).
        values_there.append(("zero_optimization.offload_optimizer.nvme_path", tempfile.gettempdir()))
    return values_there
