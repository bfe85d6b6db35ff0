"""The first lines and the warnings before a run, and its report at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from trainer.config import METHODS, RunConfig
from trainer.data.tokenised import TokenisedData
from trainer.data.tokenizer import describe_new_tokens, new_ids
from trainer.engine.rounding import half_unit
from trainer.engine.sparse import Sparse
from trainer.engine.zero.slices import stored
from trainer.model.blocks import NEW_ROWS, TOWER_PARTS, full_numel
from trainer.run.setup import Built, emulates

# The parts of a method that have names.
_NAMED_PARTS = ("substrate", "selector", "update", "bank")


def warnings(config: RunConfig, sparse: Sparse, num_steps: int) -> list[str]:
    """Return the warnings that require no weights, for a run of `num_steps` optimizer steps."""
    blocks = len(sparse.selector.reachable(len(sparse.blocks)))
    draws = math.ceil(blocks / len(sparse.active)) if len(sparse.active) < blocks else 0
    return [
        *_emulation_warning(config),
        *_saving_warning(config),
        *sparse.selector.warnings(num_steps),
        *sparse.update.warnings(steps_for_all_blocks=draws * config.selector.interval),
    ]


def image_remarks(data: TokenisedData, sparse: Sparse) -> list[str]:
    """Say what the plan leaves out if there are images, or warn if none reaches what is to train on them."""
    if data.has_images:
        return ["images: the plan is that of text; what the towers compute comes on top"]
    return [
        f"WARNING: {setting}, but no row of the data has an image (or video, or sound): no gradient will reach its "
        "weights, and at most weight decay changes them"
        for part, setting in TOWER_PARTS.items()
        if sparse.always_on.get(part)
    ]


def _emulation_warning(config: RunConfig) -> list[str]:
    """Warn if this machine's CPU emulates the half precision: a step takes minutes instead of seconds."""
    if not emulates(config.model.dtype):
        return []
    return [
        f"WARNING: this CPU has no arithmetic for model.dtype={config.model.dtype} and emulates it, many times slower "
        "than fp32: set model.dtype=fp32"
    ]


def _saving_warning(config: RunConfig) -> list[str]:
    """Warn if checkpoints are enabled but cannot be written."""
    if config.saves or config.checkpoint.every is None:
        return []
    return ["WARNING: no checkpoints: the quantised moments of optimizer.name=adamw_8bit cannot be saved yet"]


def new_token_lines(config: RunConfig, tokenizer: PreTrainedTokenizerBase, sparse: Sparse) -> list[str]:
    """Return what became of `model.add_tokens`, with a warning if their rows never train."""
    lines = describe_new_tokens(tokenizer, config.model.add_tokens)
    trained = {*sparse.always_on, *(["head"] if sparse.structure.tied and "embeddings" in sparse.always_on else [])}
    still = [part for part in ("embeddings", "head") if part not in trained]
    if new_ids(tokenizer) and still:
        lines.append(
            f"WARNING: the rows of the new tokens in {' and '.join(still)} stay the mean of the others, since "
            f"always_on.{still[0]} is false: set it to new_rows to train them"
        )
    return lines


def rounding_warning(config: RunConfig, sparse: Sparse) -> list[str]:
    """Warn if an interval's updates round away: Adam moves a weight by about the learning rate in a step."""
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
        f"{config.selector.interval} steps at optimizer.lr={config.optimizer.lr} a weight moves by at most "
        f"{reached:.1e}, and half a unit in the last place of a typical weight is {lost_below:.1e} ({weights.dtype}). "
        "Keep fp32 master weights with bank.name=cpu, raise optimizer.lr or selector.interval, or set model.dtype=fp32"
    ]


def title(config: RunConfig, built: Built, ranks: int) -> str:
    """Return the first line of a run: its method, its model, and on how many ranks it trains."""
    names = {part: getattr(config, part).name for part in _NAMED_PARTS}
    point = METHODS[config.method] if config.method else {}
    own = ", ".join(f"{part} {name}" for part, name in names.items() if not point or name != point[part]["name"])
    method = " with ".join(filter(None, [config.method, own]))
    model = config.model.path or f"a random {(config.model.random or {})['model_type']}"
    parameters = sum(_whole_numel(parameter) for parameter in built.model.parameters())
    dtype = config.model.dtype + (f", base in {config.model.quantization}" if config.model.quantization else "")
    stage = built.ds["zero_optimization"]["stage"]
    return (
        f"{method} on {model} ({parameters:,} parameters, {dtype}), {ranks} rank{'s' * (ranks > 1)}, ZeRO stage {stage}"
    )


def _whole_numel(parameter: torch.Tensor) -> int:
    """Return the elements of a parameter, which bitsandbytes may have packed: two in each byte."""
    packed = getattr(parameter, "quant_state", None)
    return full_numel(parameter) if packed is None else math.prod(packed.shape)


def one_line(sparse: Sparse, config: RunConfig, num_steps: int) -> str:
    parts = ", ".join(_always_on(sparse)) or "nothing else"
    if len(sparse.active) == len(sparse.blocks):
        return f"all {len(sparse.blocks)} blocks, with {parts}, for {num_steps} steps"
    return (
        f"{len(sparse.active)} of {len(sparse.blocks)} blocks at a time ({config.selector.name}, a new draw every "
        f"{config.selector.interval} steps), with {parts}, for {num_steps} steps"
    )


def _always_on(sparse: Sparse) -> list[str]:
    """Return the always-on parts; says so if only their rows of new tokens train."""
    return [
        f"{part} (new rows)" if any(name.endswith(f".{NEW_ROWS}") for name in parameters) else part
        for part, parameters in sparse.always_on.items()
    ]


def report(
    sparse: Sparse,
    evaluations: dict[int, float],
    data: TokenisedData,
    num_steps: int,
    written: Sequence[tuple[str, object]],
) -> str:
    always_on = ", ".join(_always_on(sparse)) or "nothing"
    samples = "streamed samples" if data.streams else f"{data.train_report.samples} samples"
    lines = [f"\nTrained {num_steps} steps on {samples}; always on: {always_on}."]
    if data.streams and data.streams.num_bad:
        lines.append(f"{data.streams.num_bad:,} rows left out since this start (data.on_bad_row: drop).")
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[max(evaluations)]
        lines.append(
            f"Evaluation loss fell from {first:.4f} to {last:.4f}."
            if last < first
            else f"Evaluation loss did not fall: {first:.4f} before, {last:.4f} after."
        )
    lines += sparse.update.report()
    lines.append("Steps in which each block trained:")
    widest = max(sparse.times_active) or 1
    for index, times in enumerate(sparse.times_active):
        lines.append(f"  block {index:>3} {times:>6} {'#' * math.ceil(30 * times / widest)}")
    never = [i for i, times in enumerate(sparse.times_active) if not times]
    if never:
        lines.append(f"Never drawn: {never}; more steps or a shorter selector.interval would reach them.")
    lines += [f"{label}: {path}" for label, path in written]
    return "\n".join(lines)
