"""What a run says of itself: the dry run, a line and a warning before it starts, a report when it is done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from trainer import model as models
from trainer.accounting import banked_bytes, dense_gradient_bytes, growing_bytes, readable
from trainer.adapters import adapt, choose_merge
from trainer.blocks import full_numel
from trainer.build import check_hardware, check_length, offload_device, prepare_model, size_buckets
from trainer.config import RunConfig, dump, total_steps
from trainer.config.deepspeed import resolve
from trainer.data import Prepared, prepare_run
from trainer.data.show import describe as describe_data
from trainer.data.tokenizer import load_tokenizer, tokenizer_name
from trainer.engine.attach import Sparse
from trainer.engine.registration import stored
from trainer.engine.rounding import half_unit
from trainer.planner import Planner
from trainer.planner.report import one_line as planned
from trainer.updates import Unmask


def describe(config: RunConfig, ranks: int) -> str:
    """The dry run: the model on the meta device, its blocks, and what each rank will hold. Trains nothing."""
    tokenizer = load_tokenizer(tokenizer_name(config.model), trust_remote_code=config.model.trust_remote_code)
    data = prepare_run(config, tokenizer)
    ds = resolve(config, ranks)
    check_hardware(config)
    model = models.on_meta(config.model, tokenizer)
    check_length(config, model)
    remarks: list[str] = []
    if config.substrate.name == "adapter":
        stage = ds["zero_optimization"]["stage"]
        adapted = adapt(model, config.substrate, stage=stage, quantization=config.model.quantization, empty=True)
        _, remarks = choose_merge(config, adapted)
        remarks += adapted.warnings
        model = adapted.model
    num_steps = total_steps(config, len(data.train))
    sparse = prepare_model(config, model, num_steps)
    size_buckets(ds, sparse, model)  # refuses what does not fit into it
    stage = ds["zero_optimization"]["stage"]
    plan = Planner(on_cpu=get_accelerator().device_name() == "cpu").plan(config, ranks)
    state = plan.state
    lines = [dump(config).rstrip(), ""]
    lines += [*remarks, *warnings(config, sparse, num_steps)]
    lines += [f"data: {line}" for line in describe_data(data, config.data.max_length)]
    lines.append(f"steps: {num_steps} of {config.train.global_batch_size} sequences")
    lines.append(f"model: {sum(p.numel() for p in model.parameters()):,} parameters")
    lines.append(
        f"blocks: {len(sparse.blocks)} at {sparse.structure.path}, {sparse.blocks[0].numel:,} parameters in the first"
    )
    for part, parameters in sparse.always_on.items():
        count = sum(p.numel() for p in parameters.values())
        lines.append(f"always on: {part}, {count:,} parameters ({', '.join(parameters)})")
    trained = sum(p.numel() for p in sparse.trainable_parameters())
    what = f"{config.update.budget:,} of {trained:,}" if config.update.name == "unmask" else f"{trained:,}"
    lines.append(f"trained at a time: {what} parameters; {one_line(sparse, config, num_steps)}")
    lines.append(f"each of {ranks} ranks holds, under ZeRO stage {stage} and before activations and buffers:")
    places = {"none": "", "cpu": " in host memory", "nvme": " on NVMe"}
    for name in ("weights", "gradients", "masters", "moments", *(["indices"] if state.indices else [])):
        device = offload_device(ds, "param" if name == "weights" else "optimizer")
        # Gradients wait in host memory for the step that swaps their group in.
        where = places["cpu" if name == "gradients" and device == "nvme" else device]
        lines.append(f"  {name:<10}{readable(getattr(state, name)):>12}{where}")
    lines.append(f"  {'total':<10}{readable(state.total):>12}")
    if isinstance(sparse.update, Unmask):
        lines += _growth(sparse.update, sparse, ds, ranks)
    if sparse.bank.keeps and config.update.name == "dense":
        inactive = [b.numel for b in sparse.blocks if b.index not in sparse.active]
        where = " in host memory" if config.bank.name == "cpu" else ""
        banked = readable(banked_bytes(inactive, ranks=ranks))
        lines.append(f"  {'bank':<10}{banked:>12}{where} more, once all blocks were drawn")
    lines.append(planned(plan))
    return "\n".join(lines)


def _growth(update: Unmask, sparse: Sparse, ds: Mapping[str, Any], ranks: int) -> list[str]:
    """What comes to it in backward."""
    trained = [full_numel(p) for p in sparse.trainable_parameters()]
    dense = max(
        dense_gradient_bytes(full_numel(p), ranks=ranks, weight_bytes=p.element_size())
        for p in sparse.trainable_parameters()
    )
    lines = [f"  {'gradient':<10}{readable(dense):>12} more in backward, of one parameter at a time"]
    candidates, accumulated = growing_bytes(
        trained, update.increment, ranks=ranks, accumulation=ds["gradient_accumulation_steps"]
    )
    growing = min(update.growth_steps, update.budget)
    while_it_grows = f"more in backward of the first {growing} steps, in which the mask grows"
    lines.append(f"  {'candidates':<10}{readable(candidates):>12} {while_it_grows}")
    if accumulated:
        lines.append(
            f"  {'sums':<10}{readable(accumulated):>12} {while_it_grows}: all gradients, over micro-batches; none "
            "without accumulation"
        )
    return lines


def warnings(config: RunConfig, sparse: Sparse, num_steps: int) -> list[str]:
    """What can be said before there are weights."""
    return [
        *_saving_warning(config),
        *_learning_warning(config, sparse, num_steps),
        *_growth_warning(config, sparse),
    ]


def _saving_warning(config: RunConfig) -> list[str]:
    """Where checkpoints are wanted and cannot be."""
    if config.saves or config.checkpoint.every is None:
        return []
    return ["WARNING: no checkpoints: the quantised moments of optimizer.name=adamw_8bit cannot be saved yet"]


def _learning_warning(config: RunConfig, sparse: Sparse, num_steps: int) -> list[str]:
    """A selector that measures less often than there are steps learns nothing."""
    if not sparse.selector.measures or any(sparse.selector.needs(step) for step in range(num_steps)):
        return []
    return [
        f"WARNING: nothing is learned of the blocks: selector.update_every is {config.selector.update_every}, "
        f"and there are {num_steps} steps. Lower it"
    ]


def _growth_warning(config: RunConfig, sparse: Sparse) -> list[str]:
    """A budget that may be spent before every block has had its turn."""
    update, blocks = sparse.update, len(sparse.selector.reachable(len(sparse.blocks)))
    if not isinstance(update, Unmask) or len(sparse.active) >= blocks:
        return []
    steps = config.selector.interval * math.ceil(blocks / len(sparse.active))
    if update.growth_steps >= steps:
        return []
    return [
        f"WARNING: the mask is whole after {update.growth_steps} steps (update.growth_steps), and until every block "
        f"has trained it takes {steps} or more: blocks that come later have no weights of their own to train. Raise "
        "update.growth_steps, or lower selector.interval"
    ]


def rounding_warning(config: RunConfig, sparse: Sparse) -> list[str]:
    """Adam moves a weight by about the learning rate a step; whether an interval of that shows in the weights."""
    weights = max(sparse.blocks[sparse.active[0]].parameters.values(), key=full_numel)
    if sparse.bank.keeps or weights.dtype is torch.float32 or len(sparse.active) == len(sparse.blocks):
        return []
    sample = stored(weights).detach().flatten()[:100_000].float()
    lost_below = half_unit(float(sample.abs().median()), weights.dtype)
    reached = config.optimizer.lr * config.selector.interval
    if reached >= lost_below:
        return []
    return [
        f"WARNING: nearly all that a block learns will be rounded away when it is frozen again: in "
        f"{config.selector.interval} steps at optimizer.lr={config.optimizer.lr} a weight moves by {reached:.1e} at "
        f"most, and half a unit in the last place of the typical one here is {lost_below:.1e} ({weights.dtype}). Keep "
        "masters with bank.name=cpu, raise optimizer.lr or selector.interval, or set model.dtype=fp32"
    ]


def one_line(sparse: Sparse, config: RunConfig, num_steps: int) -> str:
    parts = ", ".join(sparse.always_on) or "nothing else"
    if len(sparse.active) == len(sparse.blocks):
        return f"all {len(sparse.blocks)} blocks, with {parts}, for {num_steps} steps"
    return (
        f"{len(sparse.active)} of {len(sparse.blocks)} blocks at a time ({config.selector.name}, a new draw every "
        f"{config.selector.interval} steps), with {parts}, for {num_steps} steps"
    )


def report(
    sparse: Sparse, evaluations: dict[int, float], data: Prepared, num_steps: int, written: Sequence[tuple[str, Path]]
) -> str:
    always_on = ", ".join(sparse.always_on) or "nothing"
    lines = [f"\nTrained {num_steps} steps on {data.train_report.samples} samples; always on: {always_on}."]
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[max(evaluations)]
        lines.append(
            f"Evaluation loss fell from {first:.4f} to {last:.4f}."
            if last < first
            else f"Evaluation loss did not fall: {first:.4f} before, {last:.4f} after."
        )
    if isinstance(sparse.update, Unmask):
        rule = sparse.update
        lines.append(f"Unmasked {rule.unmasked:,} weights of a budget of {rule.budget:,}.")
    lines.append("Steps in which each block trained:")
    widest = max(sparse.times_active) or 1
    for index, times in enumerate(sparse.times_active):
        lines.append(f"  block {index:>3} {times:>6} {'#' * math.ceil(30 * times / widest)}")
    never = [i for i, times in enumerate(sparse.times_active) if not times]
    if never:
        lines.append(f"Never drawn: {never}; more steps or a shorter selector.interval would reach them.")
    lines += [f"{label}: {path}" for label, path in written]
    return "\n".join(lines)
