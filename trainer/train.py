"""One run, top to bottom: build the parts in order, loop, save."""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from transformers import PreTrainedTokenizerBase, get_scheduler

from trainer import model as models
from trainer import selectors, updates
from trainer.accounting import model_state, readable
from trainer.blocks import PARTS, full_numel, full_shape
from trainer.config import ConfigError, RunConfig, dump, total_steps, warmup_steps
from trainer.config.deepspeed import resolve, size_buckets
from trainer.data import Prepared, prepare_run
from trainer.data.batches import Batches, collate, count_targets, count_tokens, eval_batches
from trainer.data.show import describe as describe_data
from trainer.data.tokenizer import load_tokenizer, padding_id, tokenizer_name
from trainer.engine.attach import Sparse
from trainer.engine.attach import prepare as prepare_model
from trainer.engine.registration import stored
from trainer.engine.rounding import half_unit
from trainer.export import export
from trainer.loss import LossError, Objective, check_fused, check_packing, choose_fused
from trainer.progress import Progress
from trainer.rank_watch import watch_ranks

_OF_A_RUN = ("config.yaml", "metrics.jsonl", "model", "tensorboard", "checkpoints")


class StoppedError(RuntimeError):
    """Training could not go on; no model was written."""


def run(config: RunConfig) -> None:
    """Train as `config` says and leave the run folder behind. Runs in every rank."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    tokenizer = load_tokenizer(tokenizer_name(config.model), trust_remote_code=config.model.trust_remote_code)
    data = prepare_run(config, tokenizer)  # before there is a process group that could time out waiting
    _initialise_process_group()
    with watch_ranks():
        _train(config, tokenizer, data)
    # Only in the end: after a failure it could wait for ranks that will not come.
    torch.distributed.destroy_process_group()


def _train(config: RunConfig, tokenizer: PreTrainedTokenizerBase, data: Prepared) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ds = resolve(config, ranks)
    _check_hardware(config)
    num_steps = total_steps(config, len(data.train))
    torch.manual_seed(config.seed)
    model = models.load(config.model, tokenizer, seed=config.seed, deepspeed=ds)
    _check_length(config, model)
    torch.manual_seed(config.seed + rank)  # ranks drop out other units
    sparse = _prepare_model(config, model)
    ds = _size_buckets(ds, sparse, model)
    optimizer = _build_optimizer(config, sparse, offload=_offload_device(ds, "optimizer") != "none")
    scheduler = get_scheduler(config.schedule.name, optimizer, warmup_steps(config, num_steps), num_steps)
    fused = choose_fused(config.train.fused_loss, model)
    objective = Objective(model, fused=fused, router_loss=config.train.router_loss, deepspeed=ds)
    with _start_folder(config) as folder:
        _move_tensorboard(ds, config, folder)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=ds)
        sparse.attach(engine, guard_every=config.train.guard_every)
        engine.train()
        if fused:
            _check_fused(config, engine, objective)
        if config.data.packing:
            check_packing(engine)

    batches = Batches(
        data.sizes,
        weights=data.weights,
        fingerprint=data.fingerprint,
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=rank,
        ranks=ranks,
    )
    # How FlashAttention keeps packed samples apart.
    flat = model.config.get_text_config()._attn_implementation == "flash_attention_2"
    feed = _Feed(data, pad_id=padding_id(tokenizer), flat=flat)
    progress = Progress(folder, engine=engine, total_steps=num_steps, rank=rank)
    progress.say(f"run folder {folder}: {_one_line(sparse, config, num_steps)}")
    for line in [*describe_data(data, config.data.max_length), *_rounding_warning(config, sparse)]:
        progress.say(line)
    evaluations: dict[int, float] = {}
    meter = _Meter()

    def evaluate_after(step: int) -> None:
        if data.eval is not None and step not in evaluations:
            with meter.paused():
                evaluations[step] = evaluate(engine, objective, feed, config)
            progress.evaluation(step, evaluations[step])

    evaluate_after(0)
    skipped = 0
    # ZeRO refuses steps with infinite or NaN gradients; stage 0 (the fp32 reference) takes them, weights and all.
    may_skip = config.train.max_skipped_steps if engine.zero_optimization_stage() else 0
    for step in range(num_steps):
        lr = engine.get_lr()[0]  # of this step; the engine's next one after it
        try:
            result = train_step(engine, objective, feed.micro_batches(batches.indices(step)))
        except Exception as error:
            if "loss scale" not in str(error):  # DeepSpeed's plain Exception, at the smallest scale
                raise
            raise _stopped(step, str(error), config) from error
        meter.add(result)
        # Gradients that overflow in fp16 are the loss scale's way down, and DeepSpeed ends that at its minimum.
        fp16 = config.model.dtype == "fp16"
        skipped = 0 if result.applied or (fp16 and bool(torch.isfinite(result.loss_sum))) else skipped + 1
        if skipped > may_skip:
            allowed = f"(train.max_skipped_steps is {config.train.max_skipped_steps}"
            allowed += ")" if may_skip == config.train.max_skipped_steps else ", which ZeRO stage 0 cannot do)"
            raise _stopped(step, f"{skipped} steps in a row had NaN or infinite loss or gradients {allowed}", config)
        if (step + 1) % config.train.log_every == 0 or step + 1 == num_steps:
            rounded = {} if sparse.rounded_away is None else {"rounded_away": sparse.rounded_away}
            progress.step(step + 1, active=sparse.active, lr=lr, **meter.read(engine), **rounded)
        if config.eval.every and (step + 1) % config.eval.every == 0:
            evaluate_after(step + 1)
    evaluate_after(num_steps)
    last_loss = evaluations.get(num_steps, float(result.loss_sum))
    if not math.isfinite(last_loss):
        raise _stopped(step, f"the loss is {last_loss}", config)
    export(engine, tokenizer, folder / "model")
    progress.close()
    if rank == 0:
        print(_report(sparse, evaluations, data, num_steps, folder), flush=True)


@dataclass
class StepResult:
    """Sums over all ranks of one optimizer step, on the device: nothing here has been waited for."""

    loss_sum: torch.Tensor
    targets: torch.Tensor
    tokens: torch.Tensor  # without padding
    applied: bool


def train_step(
    engine: DeepSpeedEngine, objective: Objective, micro_batches: list[dict[str, torch.Tensor]]
) -> StepResult:
    """One optimizer step: the mean loss over the target tokens of all ranks and micro-batches.

    DeepSpeed averages over ranks, so each rank's sum is scaled by ranks / global count; ranks, accumulation and
    padding then make no difference to the result. A router's loss is a mean over micro-batches instead.
    """
    own = [(count_targets(batch["labels"]), count_tokens(batch)) for batch in micro_batches]
    counts = torch.tensor(own, dtype=torch.float64, device=engine.device).sum(dim=0)
    dist.all_reduce(counts)
    targets, tokens = counts.float()
    scale = engine.world_size / targets.clamp(min=1)
    loss_sum = torch.zeros((), device=engine.device)
    for batch in micro_batches:
        batch = {key: value.to(engine.device, non_blocking=True) for key, value in batch.items()}
        loss, router_loss = objective(engine, batch)
        extra = 0.0 if router_loss is None else router_loss / len(micro_batches)
        engine.backward(loss * scale + extra, scale_wrt_gas=False)
        engine.step()
        loss_sum += loss.detach()
    dist.all_reduce(loss_sum)
    return StepResult(loss_sum, targets, tokens, _applied(engine, loss_sum))


def _applied(engine: DeepSpeedEngine, loss_sum: torch.Tensor) -> bool:
    if engine.zero_optimization_stage() == 0:
        return engine.was_step_applied() and bool(torch.isfinite(loss_sum))
    return engine.was_step_applied()


@torch.no_grad()
def evaluate(engine: DeepSpeedEngine, objective: Objective, feed: _Feed, config: RunConfig) -> float:
    """Mean loss over the target tokens of the evaluation data, over all ranks."""
    engine.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for batch in feed.eval_batches(config, rank=dist.get_rank(), ranks=dist.get_world_size()):
        count = count_targets(batch["labels"])
        batch = {key: value.to(engine.device) for key, value in batch.items()}
        loss, _ = objective(engine, batch)
        sums += torch.stack([loss.double(), sums.new_tensor(count)])
    engine.train()
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


class _Feed:
    """Samples to padded batches on the host."""

    def __init__(self, data: Prepared, *, pad_id: int, flat: bool) -> None:
        self._data = data
        self._collate = partial(collate, pad_id=pad_id, flat=flat)

    def micro_batches(self, indices: list[list[int]]) -> list[dict[str, torch.Tensor]]:
        return [self._collate([self._data.train[i] for i in chosen]) for chosen in indices]

    def eval_batches(self, config: RunConfig, *, rank: int, ranks: int) -> list[dict[str, torch.Tensor]]:
        assert self._data.eval is not None
        size = config.eval.micro_batch_size or config.train.micro_batch_size
        batches = []
        for chosen in eval_batches(
            len(self._data.eval), micro_batch_size=size, rank=rank, ranks=ranks, max_samples=config.eval.max_samples
        ):
            # A rank without samples left goes through the forward all the same: under ZeRO-3 it is collective.
            batch = self._collate([self._data.eval[i] for i in chosen or [0]])
            if not chosen:
                batch["labels"].fill_(-100)
            batches.append(batch)
        return batches


class _Meter:
    """Averages between log lines; reading it waits for the device."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._results: list[StepResult] = []
        self._since = time.monotonic()

    def add(self, result: StepResult) -> None:
        self._results.append(result)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training time."""
        started = time.monotonic()
        yield
        self._since += time.monotonic() - started

    def read(self, engine: DeepSpeedEngine) -> dict[str, float]:
        loss = sum(float(r.loss_sum) for r in self._results) / max(1.0, sum(float(r.targets) for r in self._results))
        seconds = time.monotonic() - self._since
        values = {
            "loss": loss,
            "grad_norm": float(engine.get_global_grad_norm() or 0.0),
            "tokens_per_second": sum(float(r.tokens) for r in self._results) / seconds,
            "step_seconds": seconds / len(self._results),
        }
        if get_accelerator().device_name() != "cpu":
            values["peak_gib"] = get_accelerator().max_memory_allocated() / 2**30
        self._reset()
        return values


# --- building the parts ------------------------------------------------------------------------------------------


def _check_fused(config: RunConfig, engine: DeepSpeedEngine, objective: Objective) -> None:
    try:
        check_fused(engine, objective)
    except LossError:
        if config.train.fused_loss is True:
            raise
        objective.fused = False  # it was not asked for


def _check_hardware(config: RunConfig) -> None:
    """Half precision that the hardware has. What torch calls supported includes an emulation of bf16 that is slower
    than fp32."""
    accelerator = get_accelerator()
    on_cuda = accelerator.device_name() == "cuda"
    has = {
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False) if on_cuda else accelerator.is_bf16_supported(),
        "fp16": bool(accelerator.is_fp16_supported()),
        "fp32": True,
    }
    if not has[config.model.dtype]:
        name = torch.cuda.get_device_name() if on_cuda else accelerator.device_name()
        allowed = ", ".join(dtype for dtype, present in has.items() if present)
        raise ConfigError([f"model.dtype: {config.model.dtype}, which {name} does not have; allowed here: {allowed}"])


def _check_length(config: RunConfig, model: torch.nn.Module) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.data.max_length > positions:
        raise ConfigError(
            [
                f"data.max_length: {config.data.max_length} tokens, but the model has {positions} positions "
                f"(max_position_embeddings); allowed: 1 to {positions}"
            ]
        )


def _initialise_process_group() -> None:
    """From the launcher's variables; a process started by itself is a group of one."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if not on_cpu:
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed(dist_backend="gloo" if on_cpu else None, auto_mpi_discovery=False)


def _prepare_model(config: RunConfig, model: torch.nn.Module) -> Sparse:
    parts = [part for part in PARTS if getattr(config.always_on, part)]
    settings = {key: value for key, value in config.selector.model_dump().items() if key != "name"}
    selector = selectors.build(config.selector.name, seed=config.seed, **settings)
    try:
        return prepare_model(
            model,
            selector=selector,
            update=updates.build(config.update.name),
            bank=config.bank.name,
            always_on=parts,
            substrate=config.substrate.name,
            blocks=config.model.blocks,
        )
    except ValueError as error:  # from the selector: more blocks than there are
        raise ConfigError([str(error)]) from error


def _size_buckets(ds: dict[str, Any], sparse: Sparse, model: torch.nn.Module) -> dict[str, Any]:
    candidates = [p for block in sparse.blocks for p in block.parameters.values()]
    candidates += [p for part in sparse.always_on.values() for p in part.values()]
    outside = [sum(full_numel(p) for p in part.values()) for part in sparse.always_on.values()]
    return size_buckets(
        ds,
        largest_parameter=max(full_numel(p) for p in candidates),
        largest_group=max([block.numel for block in sparse.blocks] + outside),
        hidden=full_shape(model.get_input_embeddings().weight)[-1],
    )


def _build_optimizer(config: RunConfig, sparse: Sparse, *, offload: bool) -> torch.optim.Optimizer:
    chosen = config.optimizer
    groups = sparse.param_groups(lr=chosen.lr, weight_decay=chosen.weight_decay, lr_always_on=chosen.lr_always_on)
    settings: dict[str, Any] = {"lr": chosen.lr, "betas": chosen.betas, "eps": chosen.eps}
    decoupled = chosen.name == "adamw"
    if offload:
        return DeepSpeedCPUAdam(groups, adamw_mode=decoupled, **settings)
    if chosen.name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **settings)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return kind(groups, fused=get_accelerator().device_name() == "cuda", **settings)


def _offload_device(ds: dict[str, Any], what: str) -> str:
    return ds["zero_optimization"].get(f"offload_{what}", {}).get("device", "none")


def _output(config: RunConfig) -> Path:
    return Path(config.output).expanduser()


@contextmanager
def _start_folder(config: RunConfig) -> Iterator[Path]:
    """The run folder, with the resolved configuration in it; a folder that holds a run is never written over.

    Where what happens inside is refused, what was written goes again, and the folder with it if nothing else is there:
    it may be one of the user's.
    """
    chosen: list[Any] = [_reserve_folder(config) if dist.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(chosen)
    folder = Path(chosen[0])
    try:
        yield folder
    except BaseException:
        if dist.get_rank() == 0:
            (folder / "config.yaml").unlink(missing_ok=True)
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            with suppress(OSError):
                folder.rmdir()
        raise


def _reserve_folder(config: RunConfig) -> Path:
    wanted = _output(config)
    for number in itertools.count(1):
        # A name of its own also for "." and "..".
        folder = wanted if number == 1 else wanted.resolve().with_name(f"{wanted.resolve().name}-{number}")
        if any((folder / name).exists() for name in _OF_A_RUN):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(folder / "config.yaml", "x", encoding="utf-8") as file:  # or another job was faster
                file.write(dump(config))
            return folder
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def _move_tensorboard(ds: dict[str, Any], config: RunConfig, folder: Path) -> None:
    """Into the run folder, which is not `output` where that holds an earlier run; a path in the JSON stands."""
    if config.monitor.tensorboard and ds["tensorboard"]["output_path"] == str(_output(config) / "tensorboard"):
        ds["tensorboard"]["output_path"] = str(folder / "tensorboard")


# --- what the user is told ---------------------------------------------------------------------------------------


def describe(config: RunConfig, ranks: int) -> str:
    """The dry run: the model on the meta device, its blocks, and what each rank will hold. Trains nothing."""
    tokenizer = load_tokenizer(tokenizer_name(config.model), trust_remote_code=config.model.trust_remote_code)
    data = prepare_run(config, tokenizer)
    ds = resolve(config, ranks)
    _check_hardware(config)
    model = models.on_meta(config.model, tokenizer)
    _check_length(config, model)
    sparse = _prepare_model(config, model)
    _size_buckets(ds, sparse, model)
    stage = ds["zero_optimization"]["stage"]
    state = model_state(
        [p.numel() for p in model.parameters()],
        [[p.numel() for p in group["params"]] for group in sparse.param_groups()],
        stage=stage,
        ranks=ranks,
        weight_bytes=4 if config.model.dtype == "fp32" else 2,
        gradient_bytes=4 if ds["data_types"]["grad_accum_dtype"] in ("fp32", "float32") else 2,
        moment_bytes=2 if config.optimizer.name == "adamw_8bit" else 8,
        offload=_offload_device(ds, "optimizer") != "none",
    )
    lines = [dump(config).rstrip(), ""]
    lines += [f"data: {line}" for line in describe_data(data, config.data.max_length)]
    lines.append(f"steps: {total_steps(config, len(data.train))} of {config.train.global_batch_size} sequences")
    lines.append(f"model: {sum(p.numel() for p in model.parameters()):,} parameters")
    lines.append(
        f"blocks: {len(sparse.blocks)} at {sparse.structure.path}, {sparse.blocks[0].numel:,} parameters in the first"
    )
    for part, parameters in sparse.always_on.items():
        count = sum(p.numel() for p in parameters.values())
        lines.append(f"always on: {part}, {count:,} parameters ({', '.join(parameters)})")
    trained = sum(p.numel() for p in sparse.trainable_parameters())
    lines.append(
        f"trained at a time: {trained:,} parameters; {_one_line(sparse, config, total_steps(config, len(data.train)))}"
    )
    lines.append(f"each of {ranks} ranks holds, under ZeRO stage {stage} and before activations and buffers:")
    places = {"none": "", "cpu": " in host memory", "nvme": " on NVMe"}
    for name in ("weights", "gradients", "masters", "moments"):
        device = _offload_device(ds, "param" if name == "weights" else "optimizer")
        # Gradients wait in host memory for the step that swaps their group in.
        where = places["cpu" if name == "gradients" and device == "nvme" else device]
        lines.append(f"  {name:<10}{readable(getattr(state, name)):>12}{where}")
    lines.append(f"  {'total':<10}{readable(state.total):>12}")
    return "\n".join(lines)


def _rounding_warning(config: RunConfig, sparse: Sparse) -> list[str]:
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


def _one_line(sparse: Sparse, config: RunConfig, num_steps: int) -> str:
    parts = ", ".join(sparse.always_on) or "nothing else"
    if len(sparse.active) == len(sparse.blocks):
        return f"all {len(sparse.blocks)} blocks, with {parts}, for {num_steps} steps"
    return (
        f"{len(sparse.active)} of {len(sparse.blocks)} blocks at a time ({config.selector.name}, a new draw every "
        f"{config.selector.interval} steps), with {parts}, for {num_steps} steps"
    )


def _report(sparse: Sparse, evaluations: dict[int, float], data: Prepared, num_steps: int, folder: Path) -> str:
    always_on = ", ".join(sparse.always_on) or "nothing"
    lines = [f"\nTrained {num_steps} steps on {data.train_report.samples} samples; always on: {always_on}."]
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[max(evaluations)]
        lines.append(
            f"Evaluation loss fell from {first:.4f} to {last:.4f}."
            if last < first
            else f"Evaluation loss did not fall: {first:.4f} before, {last:.4f} after."
        )
    lines.append("Steps in which each block trained:")
    widest = max(sparse.times_active) or 1
    for index, times in enumerate(sparse.times_active):
        lines.append(f"  block {index:>3} {times:>6} {'#' * math.ceil(30 * times / widest)}")
    never = [i for i, times in enumerate(sparse.times_active) if not times]
    if never:
        lines.append(f"Never drawn: {never}; more steps or a shorter selector.interval would reach them.")
    lines.append(f"Model: {folder / 'model'}")
    return "\n".join(lines)


def _stopped(step: int, reason: str, config: RunConfig) -> StoppedError:
    clipping = config.train.gradient_clipping
    clip = f"lower train.gradient_clipping ({clipping})" if clipping else "set train.gradient_clipping (0: none)"
    return StoppedError(
        f"stopped at step {step + 1}: {reason}; no model was written. Lower optimizer.lr ({config.optimizer.lr}), "
        f"{clip}, or look at the data"
    )
