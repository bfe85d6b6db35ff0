"""One run, top to bottom: build the parts in order, loop, save."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedTokenizerBase, get_scheduler

from trainer import build
from trainer import model as models
from trainer.adapters import adapt, choose_merge
from trainer.config import RunConfig, total_steps, warmup_steps
from trainer.config.deepspeed import resolve
from trainer.data import Prepared, prepare_run
from trainer.data.batches import Batches, collate, count_targets, count_tokens, deal, eval_batches
from trainer.data.show import describe as describe_data
from trainer.data.tokenizer import load_tokenizer, padding_id, tokenizer_name
from trainer.describe import one_line, report, rounding_warning
from trainer.engine.attach import Sparse
from trainer.export import save
from trainer.loss import LossError, Objective, check_fused, check_packing, choose_fused
from trainer.picture import draw_importance
from trainer.progress import Progress
from trainer.rank_watch import watch_ranks
from trainer.run_folder import move_tensorboard, start_run_folder


class StoppedError(RuntimeError):
    """Training could not go on; no model was written."""


def run(config: RunConfig) -> None:
    """Train as `config` says and leave the run folder behind. Runs in every rank."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    tokenizer = load_tokenizer(tokenizer_name(config.model), trust_remote_code=config.model.trust_remote_code)
    data = prepare_run(config, tokenizer)  # before there is a process group that could time out waiting
    build.initialise_process_group()
    with watch_ranks():
        _train(config, tokenizer, data)
    # Only in the end: after a failure it could wait for ranks that will not come.
    torch.distributed.destroy_process_group()


def _train(config: RunConfig, tokenizer: PreTrainedTokenizerBase, data: Prepared) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ds = resolve(config, ranks)
    build.check_hardware(config)
    num_steps = total_steps(config, len(data.train))
    torch.manual_seed(config.seed)
    model = models.load(config.model, tokenizer, seed=config.seed, deepspeed=ds)
    build.check_length(config, model)
    base, adapters = model, None
    if config.substrate.name == "adapter":
        torch.manual_seed(config.seed)
        with models.partitioned_creation(ds):
            stage = ds["zero_optimization"]["stage"]
            adapters = adapt(base, config.substrate, stage=stage, quantization=config.model.quantization)
        model = adapters.model
    merge, remarks = choose_merge(config, adapters)
    remarks += adapters.warnings if adapters is not None else ()
    fused = choose_fused(config.train.fused_loss, base)
    objective = Objective(base, fused=fused, router_loss=config.train.router_loss, deepspeed=ds)
    torch.manual_seed(config.seed + rank)  # ranks drop out other units
    sparse = build.prepare_model(config, model)
    ds = build.size_buckets(ds, sparse, model)
    optimizer = build.build_optimizer(config, sparse, offload=build.offload_device(ds, "optimizer") != "none")
    scheduler = get_scheduler(config.schedule.name, optimizer, warmup_steps(config, num_steps), num_steps)
    # How FlashAttention keeps packed samples apart.
    flat = model.config.get_text_config()._attn_implementation == "flash_attention_2"
    feed = _Feed(config, data, pad_id=padding_id(tokenizer), flat=flat)
    with start_run_folder(config) as folder:
        move_tensorboard(ds, config, folder)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=ds)
        sparse.attach(engine, guard_every=config.train.guard_every, **_probing(engine, objective, feed, sparse))
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
    progress = Progress(folder, engine=engine, total_steps=num_steps, rank=rank)
    progress.say(f"run folder {folder}: {one_line(sparse, config, num_steps)}")
    for line in [*describe_data(data, config.data.max_length), *remarks, *rounding_warning(config, sparse)]:
        progress.say(line)
    evaluations: dict[int, float] = {}
    meter = _Meter()

    def evaluate_after(step: int) -> None:
        if data.eval is not None and step not in evaluations:
            with meter.paused():
                evaluations[step] = evaluate(engine, objective, feed.eval_batches())
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
        progress.importance(step + 1, sparse.selector.importance())
        if config.eval.every and (step + 1) % config.eval.every == 0:
            evaluate_after(step + 1)
    evaluate_after(num_steps)
    last_loss = evaluations.get(num_steps, float(result.loss_sum))
    if not math.isfinite(last_loss):
        raise _stopped(step, f"the loss is {last_loss}", config)
    written = save(engine, tokenizer, folder, adapters, merge=merge)
    progress.close()
    if rank == 0:
        pictures = draw_importance(folder, sparse.times_active)
        print(report(sparse, evaluations, data, num_steps, [*written, *pictures]), flush=True)


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
def evaluate(engine: DeepSpeedEngine, objective: Objective, batches: list[dict[str, torch.Tensor]]) -> float:
    """Mean loss over the target tokens of the batches of all ranks."""
    engine.eval()
    loss, count = _summed(engine, objective, batches)
    engine.train()
    sums = torch.stack([loss, loss.new_tensor(count)])
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def _summed(
    engine: DeepSpeedEngine, objective: Objective, batches: list[dict[str, torch.Tensor]]
) -> tuple[torch.Tensor, int]:
    """(loss summed over this rank's target tokens, fp64; their number)."""
    total, count = torch.zeros((), dtype=torch.float64, device=engine.device), 0
    for batch in batches:
        count += count_targets(batch["labels"])
        loss, _ = objective(engine, {key: value.to(engine.device) for key, value in batch.items()})
        total += loss.double()
    return total, count


def _probing(engine: DeepSpeedEngine, objective: Objective, feed: _Feed, sparse: Sparse) -> dict[str, Any]:
    """What `attach` wants for a selector that measures."""
    if not sparse.selector.measures:
        return {}
    return {
        "probe_batches": feed.probe_batches(),
        "loss_function": lambda module, batches: _summed(engine, objective, batches),
    }


class _Feed:
    """Samples to padded batches on the host, for this rank."""

    def __init__(self, config: RunConfig, data: Prepared, *, pad_id: int, flat: bool) -> None:
        self._config = config
        self._data = data
        self._collate = partial(collate, pad_id=pad_id, flat=flat)
        self._place = {"rank": dist.get_rank(), "ranks": dist.get_world_size()}

    def micro_batches(self, indices: list[list[int]]) -> list[dict[str, torch.Tensor]]:
        return [self._collate([self._data.train[i] for i in chosen]) for chosen in indices]

    def eval_batches(self) -> list[dict[str, torch.Tensor]]:
        assert self._data.eval is not None
        dealt = eval_batches(
            len(self._data.eval),
            micro_batch_size=self._eval_size,
            max_samples=self._config.eval.max_samples,
            **self._place,
        )
        return self._batches_of(self._data.eval, dealt)

    def probe_batches(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        """For each probe its sequences, in an order of their own: one pass over the data after another."""
        probe = self._config.selector.probe
        held_out = probe.data == "eval"
        samples = self._data.eval if held_out else self._data.train
        size = min(probe.batch_size, len(samples))
        # Seeds of training are below 2**63.
        order = Batches(
            [len(samples)] if held_out else self._data.sizes,
            weights=None if held_out else self._data.weights,
            seed=self._config.seed + 2**63,
            global_batch_size=size,
            micro_batch_size=size,
            rank=0,
            ranks=1,
        )
        # A few sequences: in micro-batches as large as an evaluation's, some ranks would get none.
        share = min(self._eval_size, -(-size // self._place["ranks"]))
        for number in itertools.count():
            dealt = deal(order.indices(number)[0], micro_batch_size=share, **self._place)
            yield self._batches_of(samples, dealt)

    @property
    def _eval_size(self) -> int:
        return self._config.eval.micro_batch_size or self._config.train.micro_batch_size

    def _batches_of(self, samples: Any, dealt: list[list[int]]) -> list[dict[str, torch.Tensor]]:
        batches = []
        for chosen in dealt:
            # A rank without samples left goes through the forward all the same: under ZeRO-3 it is collective.
            batch = self._collate([samples[i] for i in chosen or [0]])
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


def _check_fused(config: RunConfig, engine: DeepSpeedEngine, objective: Objective) -> None:
    try:
        check_fused(engine, objective)
    except LossError:
        if config.train.fused_loss is True:
            raise
        objective.fused = False  # it was not asked for


def _stopped(step: int, reason: str, config: RunConfig) -> StoppedError:
    clipping = config.train.gradient_clipping
    clip = f"lower train.gradient_clipping ({clipping})" if clipping else "set train.gradient_clipping (0: none)"
    return StoppedError(
        f"stopped at step {step + 1}: {reason}; no model was written. Lower optimizer.lr ({config.optimizer.lr}), "
        f"{clip}, or look at the data"
    )
