"""Find what contradicts the run in a DeepSpeed configuration."""

import json
from collections.abc import Mapping
from typing import Any

from trainer.config.deepspeed.buckets import SIZED
from trainer.config.deepspeed.keys import COUNTS, REFUSED, ZERO_ALIASES, ZERO_COUNTS, ZERO_FLAGS
from trainer.config.deepspeed.values import AUTO
from trainer.config.schema import RunConfig
from trainer.settings.nested import get

_MOST_ELEMENTS = 10**15


def refused(values: Mapping[str, Any], source: str) -> list[str]:
    problems = []
    for key, (off, reason) in REFUSED.items():
        value = get(values, key)
        harmless = value is None or value == AUTO or any(value is allowed or value == allowed for allowed in off)
        if isinstance(value, Mapping):
            harmless = value.get("enabled") is False or value.get("device") == "none"
        if not harmless:
            problems.append(f"deepspeed: {key} is {json.dumps(value)} in {source}; {reason}")
    return problems


def zero_problems(values: Mapping[str, Any], config: RunConfig, source: str) -> list[str]:
    stage = get(values, "zero_optimization.stage")
    # True == 1 in Python, and DeepSpeed reads `"zero_optimization": true` as stage 1.
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        found = "missing" if stage is None else f"{json.dumps(stage)}"
        return [f"deepspeed: zero_optimization.stage is {found} in {source}; allowed: 0, 1, 2, 3"]
    problems = []
    if stage == 0 and config.model.dtype != "fp32":
        problems.append(
            f"deepspeed: zero_optimization.stage is 0 in {source} but model.dtype is {config.model.dtype}: stage 0 is "
            "the fp32 reference; set model.dtype=fp32 or another preset (deepspeed=zero1)"
        )
    if stage == 3 and config.model.quantization is not None:
        problems.append(
            f"deepspeed: zero_optimization.stage is 3 in {source} but model.quantization is "
            f"{config.model.quantization}: ZeRO-3 would cut packed weights apart; set deepspeed=zero2, or "
            "model.quantization=null"
        )
    problems += _offload_problems(values, stage, source)
    hpz = get(values, "zero_optimization.zero_hpz_partition_size", 0)
    if stage == 3 and hpz not in (0, 1) and get(values, "zero_optimization.offload_param.device", "none") != "none":
        problems.append(
            f"deepspeed: zero_optimization.zero_hpz_partition_size is {json.dumps(hpz)} in {source} with "
            "offload_param: a copy of the weights on each node contradicts weights in host memory; remove either"
        )
    offload = get(values, "zero_optimization.offload_optimizer.device", "none")
    if config.optimizer.name == "adamw_8bit" and offload != "none":
        problems.append(
            f"deepspeed: zero_optimization.offload_optimizer.device is {json.dumps(offload)} in {source}, but "
            "optimizer.name=adamw_8bit steps on the device: set optimizer.name=adamw, or the device to none"
        )
    if config.update.own_state and offload != "none":
        problems.append(
            f"deepspeed: zero_optimization.offload_optimizer.device is {json.dumps(offload)} in {source}, but "
            f"update.name={config.update.name} has state of its own that stays on the device: set the device to none, "
            "or deepspeed=zero3"
        )
    zero = values["zero_optimization"]
    for name in (*ZERO_COUNTS, *(ZERO_ALIASES[name] for name in ZERO_COUNTS if name in ZERO_ALIASES)):
        value = zero.get(name, AUTO)
        if value != AUTO and not (_is_count(value) and value <= _MOST_ELEMENTS):
            problems.append(
                f"deepspeed: zero_optimization.{name} is {json.dumps(value)} in {source}; "
                'allowed: integer >= 0 (elements), or "auto"'
            )
    for name in COUNTS:
        value = get(values, name, AUTO)
        if value != AUTO and not (_is_count(value) and value >= 1):
            problems.append(f"deepspeed: {name} is {json.dumps(value)} in {source}; allowed: integer >= 1")
    for name in ZERO_FLAGS:
        if zero.get(name) not in (None, AUTO) and not isinstance(zero[name], bool):
            found = json.dumps(zero[name])
            problems.append(f"deepspeed: zero_optimization.{name} is {found} in {source}; allowed: true, false, auto")
    for name, alias in ZERO_ALIASES.items():
        if name in zero and alias in zero:
            problems.append(f"deepspeed: zero_optimization.{name} and {alias} in {source} are the same key; keep one")
    return problems


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and not value % 1


def _offload_problems(values: Mapping[str, Any], stage: int, source: str) -> list[str]:
    problems = []
    for name, devices, first_stage in (("offload_optimizer", ("cpu", "nvme"), 1), ("offload_param", ("cpu",), 3)):
        offload = get(values, f"zero_optimization.{name}")
        if not isinstance(offload, Mapping) or offload.get("device", "none") == "none":
            continue
        device = offload["device"]
        found = f"deepspeed: zero_optimization.{name}.device is {json.dumps(device)} in {source}"
        if device not in devices:
            problems.append(f"{found}; allowed: none, {', '.join(devices)}")
        elif stage < first_stage:
            allowed = "stage 3" if first_stage == 3 else "stage 1, 2 or 3"
            problems.append(f"{found} but the stage is {stage}; {name} needs {allowed}")
        elif device == "nvme" and stage != 3:
            problems.append(
                f"{found} but the stage is {stage}, for which DeepSpeed silently uses the CPU; "
                'use stage 3, or write "cpu"'
            )
        elif device == "nvme" and not offload.get("nvme_path"):
            problems.append(f"{found} but nvme_path is missing; set zero_optimization.{name}.nvme_path to a folder")
    return problems


def type_problems(values: Mapping[str, Any], config: RunConfig, source: str) -> list[str]:
    """Return the keys that contradict model.dtype or monitor.tensorboard."""
    problems = []
    dtype = config.model.dtype
    accumulation = get(values, "data_types.grad_accum_dtype", AUTO) or AUTO
    allowed = ("fp32",) if dtype == "fp32" else (dtype, "fp32")
    if accumulation not in (*allowed, AUTO):
        problems.append(
            f"deepspeed: data_types.grad_accum_dtype is {json.dumps(accumulation)} in {source} but model.dtype is "
            f'{dtype}; allowed: {", ".join(allowed)}, "auto"'
        )
    # deepspeed 0.19.8 (engine.py, _do_optimizer_sanity_check) takes BF16_Optimizer here instead of its ZeRO optimizer:
    # masters and gradients in buffers of another layout, which cannot be switched. With CPU offload it does not.
    offloaded = get(values, "zero_optimization.offload_optimizer.device") == "cpu"
    if dtype == "bf16" and accumulation == "fp32" and get(values, "zero_optimization.stage") == 1 and not offloaded:
        problems.append(
            f'deepspeed: data_types.grad_accum_dtype is "fp32" in {source} on stage 1 with model.dtype bf16, for which '
            'DeepSpeed uses an optimizer that cannot be switched; write "bf16", or use stage 2 (deepspeed=zero2)'
        )
    tensorboard = config.monitor.tensorboard
    for key, run_key, expected, shown in (
        ("data_types.param_dtype", "model.dtype", dtype, dtype),
        ("tensorboard.enabled", "monitor.tensorboard", tensorboard, json.dumps(tensorboard)),
    ):
        found = get(values, key)
        if found not in (None, AUTO, expected):
            problems.append(
                f"deepspeed: {key} is {json.dumps(found)} in {source} but {run_key} is {shown}: change one of them"
            )
    return problems


def auto_problems(values: Mapping[str, Any], source: str, prefix: str = "") -> list[str]:
    """Return the keys whose "auto" DeepSpeed would read as a value, or drop silently."""
    sized = {f"zero_optimization.{key}" for name in SIZED for key in (name, ZERO_ALIASES.get(name, name))}
    problems = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            problems += auto_problems(value, source, f"{path}.")
        elif value == AUTO and path not in sized and path != "data_types.keep_in_fp32_modules":
            problems.append(f'deepspeed: {path} is "auto" in {source}, but the run has no value for it; write a value')
    return problems
