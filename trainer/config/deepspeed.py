"""The DeepSpeed dictionary of a run: read from a preset or a file, filled and checked against the run configuration.

Imports no torch. Two steps, because bucket sizes need the model: `resolve` before it is built, `size_buckets` after.
"""

import copy
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.deepspeed_keys import BLOCKS, REFUSED, ZERO_ALIASES, ZERO_COUNTS, ZERO_FLAGS
from trainer.config.errors import ConfigError, hint
from trainer.config.run_size import Batch, resolve_batch
from trainer.config.schema import RunConfig

PRESET_FOLDER = Path(__file__).resolve().parent.parent / "ds_configs"
AUTO = "auto"
_MISSING = object()

# DeepSpeed prints a line of its own every `steps_per_print` steps; the loop has its own bar.
_NEVER = 10**9
_PREFETCH_DEFAULT = 5 * 10**7
_LIVE_DEFAULT = 10**9
_PERSISTENCE_DEFAULT = 10**5
# What `size_buckets` fills; "auto" is left standing until then.
_SIZED = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "sub_group_size",
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
)


def presets() -> list[str]:
    """Names of the presets in ds_configs/."""
    return sorted(file.stem for file in PRESET_FOLDER.glob("*.json"))


def is_path(name: str) -> bool:
    """Whether `deepspeed: name` means a file rather than a preset."""
    return name.endswith(".json") or "/" in name


def read(name: str) -> dict[str, Any]:
    """The JSON object of a preset or file. ConfigError: missing, unreadable, invalid (with line), unknown keys."""
    file = Path(name).expanduser() if is_path(name) else PRESET_FOLDER / f"{name}.json"
    if not is_path(name) and name not in presets():
        known = presets()
        allowed = f"{' | '.join(known)} | path of a JSON file"
        raise ConfigError([f"deepspeed: got {name!r}; allowed: {allowed}{hint(name, known)}"])
    try:
        text = file.read_bytes().decode("utf-8")
        values = json.loads(text, object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        names = [place.name for place in file.parent.glob("*.json")]
        raise ConfigError([f"deepspeed: no such file: {name!r}{hint(file.name, names)}"]) from None
    except OSError as error:
        raise ConfigError([f"deepspeed: cannot read {name!r}: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"deepspeed: {name!r} is not UTF-8 text (byte {error.start})"]) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError([f"deepspeed: {name!r} is not valid JSON: {where}: {error.msg}"]) from None
    except _DuplicateKey as error:
        raise ConfigError([f"deepspeed: {name!r} gives key {error} twice"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"deepspeed: {name!r} holds a {type(values).__name__}; it must hold a JSON object"])
    problems = _key_problems(values, _source(name))
    if problems:
        raise ConfigError(problems)
    return values


class _DuplicateKey(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _DuplicateKey(repr(key))
        values[key] = value
    return values


def _source(name: str) -> str:
    return Path(name).name if is_path(name) else f"{name}.json"


def _key_problems(values: Mapping[str, Any], source: str) -> list[str]:
    problems = []
    for block, known in BLOCKS.items():
        found = _get(values, block, _MISSING) if block else values
        if found is _MISSING:
            continue
        if not isinstance(found, Mapping):
            problems.append(
                f"deepspeed: {block} is {json.dumps(found)} in {source}; it must be an object of keys and values"
            )
            continue
        prefix = f"{block}." if block else ""
        problems += [
            f"deepspeed: {prefix}{key} in {source}: unknown key{hint(key, known)}" for key in found if key not in known
        ]
    return problems


def _get(values: Mapping[str, Any], path: str, default: Any = None) -> Any:
    holder: Any = values
    for name in path.split("."):
        if not isinstance(holder, Mapping) or name not in holder:
            return default
        holder = holder[name]
    return holder


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *blocks, name = path.split(".")
    for block in blocks:
        values = values.setdefault(block, {})
    values[name] = value


@dataclass(frozen=True)
class _Fill:
    """A DeepSpeed key whose value follows from the run; `run_key` is what a user would change instead."""

    key: str
    value: Any
    run_key: str
    run_value: Any


def resolve(config: RunConfig, ranks: int, *, local_ranks: int | None = None) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`, except for the sizes that `size_buckets` adds.

    `local_ranks` is the number of ranks on each machine, by default what the launcher says. Missing keys and "auto" are
    filled from the run. Raises ConfigError with every value that contradicts the run, and with everything that Strata
    cannot work with.
    """
    values = read(config.deepspeed)
    source = _source(config.deepspeed)
    problems = (
        _refused(values, source) + _zero_problems(values, config, source) + _type_problems(values, config, source)
    )
    fills = _run_fills(config)
    try:
        fills += _batch_fills(resolve_batch(config, ranks))
    except ConfigError as error:
        problems += error.problems
    for fill in fills:
        found = _get(values, fill.key, AUTO)
        if found != AUTO and (found != fill.value or isinstance(found, bool) != isinstance(fill.value, bool)):
            problems.append(
                f"deepspeed: {fill.key} is {json.dumps(found)} in {source} but {fill.run_key} is {fill.run_value}: "
                f'change one of them, or write "auto" in {source}'
            )
        _set(values, fill.key, fill.value)
    for key, value in [*_defaults(config, values), *_places(config, values, ranks, local_ranks)]:
        if _get(values, key, AUTO) == AUTO:
            _set(values, key, value)
    problems += _auto_problems(values, source)
    if problems:
        raise ConfigError(problems)
    return values


def _run_fills(config: RunConfig) -> list[_Fill]:
    clipping, dtype = config.train.gradient_clipping, config.model.dtype
    return [
        # DeepSpeed 0.19.8 clips at 1.0 where this is missing.
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
    """(key, value) of what the run decides where the JSON does not."""
    defaults: list[tuple[str, Any]] = [
        ("steps_per_print", _NEVER),
        ("wall_clock_breakdown", False),
        # It waits for the device before every forward, and so for blocks that the bank copies back beside it.
        ("timers.throughput.enabled", False),
        ("zero_allow_untested_optimizer", True),
        ("bf16.check_grad_overflow", True),
        # Also what DeepSpeed takes by itself; for fp32 accumulation of bf16 see _type_problems.
        ("data_types.grad_accum_dtype", config.model.dtype),
        ("zero_optimization.contiguous_gradients", True),
        ("zero_optimization.round_robin_gradients", False),
        # DeepSpeed's own choice: on for stage 3 only.
        ("zero_optimization.overlap_comm", _get(values, "zero_optimization.stage") == 3),
    ]
    if config.model.dtype == "fp16":
        # Dynamic scaling that comes down by one power with every overflow; DeepSpeed's 2 waits for a second one.
        defaults += [("fp16.loss_scale", 0), ("fp16.initial_scale_power", 16), ("fp16.hysteresis", 1)]
    if config.monitor.tensorboard:
        defaults += [
            ("tensorboard.enabled", True),
            ("tensorboard.output_path", str(Path(config.output).expanduser() / "tensorboard")),
            ("tensorboard.job_name", "strata"),
        ]
    elif _get(values, "tensorboard.enabled") == AUTO:
        defaults.append(("tensorboard.enabled", False))
    return defaults


def _places(config: RunConfig, values: Mapping[str, Any], ranks: int, local_ranks: int | None) -> list[tuple[str, Any]]:
    """(key, value) of what depends on the machines, where it is "auto"."""
    places: list[tuple[str, Any]] = []
    if _get(values, "zero_optimization.zero_hpz_partition_size") == AUTO:
        # torchrun says LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE.
        named = local_ranks or int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        # On one machine a second copy of the weights there would save nothing.
        places.append(("zero_optimization.zero_hpz_partition_size", named if named < ranks else 1))
    if _get(values, "zero_optimization.offload_optimizer.nvme_path") == AUTO:
        folder = Path(tempfile.gettempdir()) / "strata" / Path(config.output).name
        places.append(("zero_optimization.offload_optimizer.nvme_path", str(folder)))
    return places


def _refused(values: Mapping[str, Any], source: str) -> list[str]:
    problems = []
    for key, (off, reason) in REFUSED.items():
        value = _get(values, key)
        harmless = value is None or value == AUTO or any(value is allowed or value == allowed for allowed in off)
        if isinstance(value, Mapping):
            harmless = value.get("enabled") is False or value.get("device") == "none"
        if not harmless:
            problems.append(f"deepspeed: {key} is {json.dumps(value)} in {source}; {reason}")
    return problems


def _zero_problems(values: Mapping[str, Any], config: RunConfig, source: str) -> list[str]:
    stage = _get(values, "zero_optimization.stage")
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
    hpz = _get(values, "zero_optimization.zero_hpz_partition_size", 0)
    if stage == 3 and hpz not in (0, 1) and _get(values, "zero_optimization.offload_param.device", "none") != "none":
        problems.append(
            f"deepspeed: zero_optimization.zero_hpz_partition_size is {json.dumps(hpz)} in {source} with "
            "offload_param: a copy of the weights on each machine and weights in host memory; take one of them out"
        )
    offload = _get(values, "zero_optimization.offload_optimizer.device", "none")
    if config.optimizer.name == "adamw_8bit" and offload != "none":
        problems.append(
            f"deepspeed: zero_optimization.offload_optimizer.device is {json.dumps(offload)} in {source}, but "
            "optimizer.name=adamw_8bit steps on the device: set optimizer.name=adamw, or the device to none"
        )
    if config.update.name == "unmask" and offload != "none":
        problems.append(
            f"deepspeed: zero_optimization.offload_optimizer.device is {json.dumps(offload)} in {source}, but the "
            "state of update.name=unmask is small and stays on the device: set the device to none, or deepspeed=zero3"
        )
    zero = values["zero_optimization"]
    for name in (*ZERO_COUNTS, *(ZERO_ALIASES[name] for name in ZERO_COUNTS if name in ZERO_ALIASES)):
        value = zero.get(name, AUTO)
        if value != AUTO and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1):
            problems.append(
                f"deepspeed: zero_optimization.{name} is {json.dumps(value)} in {source}; "
                'allowed: integer >= 0 (elements), or "auto"'
            )
    for name in ZERO_FLAGS:
        if zero.get(name) not in (None, AUTO) and not isinstance(zero[name], bool):
            found = json.dumps(zero[name])
            problems.append(f"deepspeed: zero_optimization.{name} is {found} in {source}; allowed: true, false, auto")
    for name, alias in ZERO_ALIASES.items():
        if name in zero and alias in zero:
            problems.append(f"deepspeed: zero_optimization.{name} and {alias} in {source} are the same key; keep one")
    return problems


def _offload_problems(values: Mapping[str, Any], stage: int, source: str) -> list[str]:
    problems = []
    for name, devices, first_stage in (("offload_optimizer", ("cpu", "nvme"), 1), ("offload_param", ("cpu",), 3)):
        offload = _get(values, f"zero_optimization.{name}")
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
                f'{found} but the stage is {stage}, where DeepSpeed silently takes the CPU; use stage 3, or write "cpu"'
            )
        elif device == "nvme" and not offload.get("nvme_path"):
            problems.append(f"{found} but nvme_path is missing; set zero_optimization.{name}.nvme_path to a folder")
    return problems


def _type_problems(values: Mapping[str, Any], config: RunConfig, source: str) -> list[str]:
    """Types of gradients and parameters against model.dtype."""
    problems = []
    dtype = config.model.dtype
    accumulation = _get(values, "data_types.grad_accum_dtype", AUTO) or AUTO
    allowed = ("fp32",) if dtype == "fp32" else (dtype, "fp32")
    if accumulation not in (*allowed, AUTO):
        problems.append(
            f"deepspeed: data_types.grad_accum_dtype is {json.dumps(accumulation)} in {source} but model.dtype is "
            f'{dtype}; allowed: {", ".join(allowed)}, "auto"'
        )
    # deepspeed 0.19.8 (engine.py, _do_optimizer_sanity_check) takes BF16_Optimizer here instead of its ZeRO optimizer:
    # masters and gradients in buffers of another layout, which cannot be switched. With CPU offload it does not.
    offloaded = _get(values, "zero_optimization.offload_optimizer.device") == "cpu"
    if dtype == "bf16" and accumulation == "fp32" and _get(values, "zero_optimization.stage") == 1 and not offloaded:
        problems.append(
            f'deepspeed: data_types.grad_accum_dtype is "fp32" in {source} on stage 1 with model.dtype bf16, for which '
            'DeepSpeed uses an optimizer that cannot be switched; write "bf16", or use stage 2 (deepspeed=zero2)'
        )
    tensorboard = config.monitor.tensorboard
    for key, run_key, expected, shown in (
        ("data_types.param_dtype", "model.dtype", dtype, dtype),
        ("tensorboard.enabled", "monitor.tensorboard", tensorboard, json.dumps(tensorboard)),
    ):
        found = _get(values, key)
        if found not in (None, AUTO, expected):
            problems.append(
                f"deepspeed: {key} is {json.dumps(found)} in {source} but {run_key} is {shown}: change one of them"
            )
    return problems


def _auto_problems(values: Mapping[str, Any], source: str, prefix: str = "") -> list[str]:
    """DeepSpeed would take "auto" for a value, or drop it without a word."""
    sized = {f"zero_optimization.{key}" for name in _SIZED for key in (name, ZERO_ALIASES.get(name, name))}
    problems = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            problems += _auto_problems(value, source, f"{path}.")
        elif value == AUTO and path not in sized and path != "data_types.keep_in_fp32_modules":
            problems.append(f'deepspeed: {path} is "auto" in {source}, but the run has no value for it; write a value')
    return problems


def zero_size(ds: Mapping[str, Any], name: str) -> int:
    """A size of `zero_optimization`, by the name of its field, whichever spelling it has; 0 where there is none."""
    zero = ds["zero_optimization"]
    return int(zero.get(name, zero.get(ZERO_ALIASES.get(name, name), 0)))


def size_buckets(
    ds: Mapping[str, Any], *, largest_parameter: int, largest_group: int, largest_block: int, hidden: int
) -> dict[str, Any]:
    """A copy of `ds` with the buffer and prefetch sizes of its ZeRO stage that it leaves open ("auto" or missing).

    All sizes are elements, not bytes. largest_parameter: of those that may train. largest_group: of the optimizer's
    groups. largest_block: all that a block holds, with what never trains. hidden: the model's hidden size. A value in
    `ds` stands, except that ConfigError is raised for a sub_group_size below largest_group on stage 3.
    """
    given = (largest_parameter, largest_group, largest_block, hidden)
    assert min(given) >= 1, given
    sized = copy.deepcopy(dict(ds))
    zero = sized["zero_optimization"]
    # The spelling of each key: the one that stands there, else the documented one.
    spelled = {name: name if name in zero else ZERO_ALIASES.get(name, name) for name in _SIZED}
    sizes = _sizes(zero["stage"], *given)
    for name, key in spelled.items():
        if zero.get(key, AUTO) == AUTO:
            zero.pop(key, None)
            if name in sizes:
                zero[key] = sizes[name]
    # Else a group's state lies in several flat partitions, which banks cannot address.
    if zero["stage"] == 3 and (limit := zero[spelled["sub_group_size"]]) < largest_group:
        problem = (
            f"deepspeed: zero_optimization.sub_group_size is {limit} but the largest group of parameters has "
            f'{largest_group} elements and must fit in one; raise it, or write "auto"'
        )
        raise ConfigError([problem])
    return sized


def _sizes(stage: int, largest_parameter: int, largest_group: int, largest_block: int, hidden: int) -> dict[str, int]:
    if stage == 0:
        return {}
    # A buffer of this many elements is held on every rank (stages 1 and 2 with overlap_comm hold two). DeepSpeed's 5e8
    # is a gigabyte in bf16 whatever the model. A smaller one would be right too, but a gradient that does not fit is
    # reduced outside of it, in memory allocated anew on every backward.
    sizes = {"reduce_bucket_size": largest_parameter}
    if stage < 3:
        # Only backends without all_gather_into_tensor gather in pieces of this size. DeepSpeed asserts that it is even.
        return sizes | {"allgather_bucket_size": largest_parameter + largest_parameter % 2}
    fetched = max(largest_group, largest_block)  # at a time
    return sizes | {
        # The limit of one sub-group; it reserves nothing, so DeepSpeed's own limit unless a group is larger.
        "sub_group_size": max(_LIVE_DEFAULT, largest_group),
        # Gathered ahead of use, at each module: at most one block, so that a small model is not held whole.
        "prefetch_bucket_size": min(_PREFETCH_DEFAULT, fetched),
        # Norms and biases (a few times `hidden`) stay whole on every rank: gathering them costs latency, saves little.
        # The last bound keeps hidden x hidden matrices partitioned in models of ten columns or fewer.
        "param_persistence_threshold": min(_PERSISTENCE_DEFAULT, 10 * hidden, max(hidden, hidden * hidden - 1)),
        # Prefetching stops at this many gathered elements: a block in use, the next one, and one large matrix (the
        # head). DeepSpeed's 1e9 would let it run ahead through the whole of a small model.
        "max_live_parameters": min(_LIVE_DEFAULT, 2 * fetched + largest_parameter),
        # What is used again within this distance is not released: the last block between forward and backward, and
        # with activation checkpointing each block between its recomputation and its backward. At 1e9 nothing of a
        # small model is ever released.
        "max_reuse_distance": min(_LIVE_DEFAULT, fetched),
    }
