"""One run, top to bottom: build the parts in order, loop, save."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from transformers import PreTrainedTokenizerBase, get_scheduler

from trainer import build
from trainer import model as models
from trainer.adapters import adapt, choose_merge, reads_base
from trainer.blocks import full_numel
from trainer.checkpoint import CheckpointError, Checkpoints, LeaseError
from trainer.cluster.together import check_nodes
from trainer.config import RunConfig, total_steps, warmup_steps
from trainer.config.deepspeed import resolve
from trainer.data import Prepared, prepare_run
from trainer.data.batches import Batches
from trainer.data.show import describe as describe_data
from trainer.data.tokenizer import load_tokenizer, padding_id, tokenizer_name
from trainer.describe import one_line, report, rounding_warning, warnings
from trainer.engine.attach import Sparse
from trainer.export import Together, save
from trainer.feed import Feed
from trainer.history import History
from trainer.interruption import EXIT_INTERRUPTED, Interrupted, Interruption
from trainer.loss import LossError, Objective, check_fused, check_packing, choose_fused
from trainer.picture import draw_importance
from trainer.planner.watch import PeakWatch
from trainer.progress import Meter, Progress
from trainer.rank_watch import watch_ranks
from trainer.resuming import FinishedError
from trainer.run_folder import RunFolder, move_tensorboard, start_run_folder
from trainer.step import StepResult, evaluate, summed_over, train_step
from trainer.updates import UpdateError


class StoppedError(RuntimeError):
    """Training could not go on; no model was written."""


def run(config: RunConfig, interruption: Interruption) -> int:
    """Train as `config` says and leave the run folder behind; returns the exit code. Runs in every rank."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    tokenizer = load_tokenizer(tokenizer_name(config.model), trust_remote_code=config.model.trust_remote_code)
    data = prepare_run(config, tokenizer)  # before there is a process group that could time out waiting
    build.initialise_process_group(timeout_minutes=config.train.timeout_minutes)
    with watch_ranks():
        check_nodes(Path(config.output))
        try:
            with start_run_folder(config) as place:
                code = _train(config, tokenizer, data, place, interruption)
        except FinishedError as finished:  # its node was lost, or the job requeued, at the very end
            code = 0
            if dist.get_rank() == 0:
                print(finished, flush=True)
    # Only in the end: after a failure it could wait for ranks that will not come.
    torch.distributed.destroy_process_group()
    return code


def _train(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    place: RunFolder,
    interruption: Interruption,
) -> int:
    folder = place.path
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ds = resolve(config, ranks)
    build.check_hardware(config)
    num_steps = total_steps(config, len(data.train))
    watch = PeakWatch(config)
    torch.manual_seed(config.seed)
    onto_device = not reads_base(config.substrate)
    model = models.load(config.model, tokenizer, seed=config.seed, deepspeed=ds, place=onto_device)
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
    sparse = build.prepare_model(config, model, num_steps)
    ds = build.size_buckets(ds, sparse, model)
    optimizer = build.build_optimizer(config, sparse, offload=build.offload_device(ds, "optimizer") != "none")
    scheduler = get_scheduler(config.schedule.name, optimizer, warmup_steps(config, num_steps), num_steps)
    # How FlashAttention keeps packed samples apart.
    flat = model.config.get_text_config()._attn_implementation == "flash_attention_2"
    feed = Feed(config, data, pad_id=padding_id(tokenizer), flat=flat)
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
    move_tensorboard(ds, config, folder)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=ds)
    sparse.attach(engine, guard_every=config.train.guard_every, **_probing(engine, objective, feed, sparse))
    engine.train()
    if fused:
        _check_fused(config, engine, objective)
    if config.data.packing:
        check_packing(engine)
    settings = config.checkpoint.model_dump()
    history = History(
        Checkpoints(sparse, folder, keep=settings["keep"], asynchronous=settings["async"], lease=place.lease),
        config,
        batches,
        scheduler,
        job=place.lease.holder.job if place.lease is not None else None,
    )
    meter = Meter()
    resumed = history.resume(folder, meter)
    whole = adapters is None or merge
    history.checkpoints.require_space(_bytes_to_write(config, sparse, model if whole else None), "this run at least")

    progress = Progress(folder, engine=engine, total_steps=num_steps, rank=rank, first_step=history.step)
    progress.say(f"run folder {folder}: {one_line(sparse, config, num_steps)}")
    for line in watch.start():
        progress.say(line)
    hints = [*warnings(config, sparse, num_steps), *rounding_warning(config, sparse)]
    for line in [*describe_data(data, config.data.max_length), *remarks, *hints]:
        progress.say(line)
    for line in resumed:
        progress.say(line)

    def may_go_on() -> None:
        """Asked on all ranks between the blocks of an export."""
        if config.saves:
            interruption.check(engine.device)
        place.check_lease()

    interruption.remember()
    loop = _Loop(config, engine, objective, sparse, feed, batches, history, progress, num_steps, interruption, meter)
    try:
        loop.run()
        peak, figures = watch.result()
        progress.summary(history.step, **figures)
        written, failure = save(
            engine, tokenizer, folder, adapters, merge=merge, step=Together(may_go_on, place.publishing)
        )
    except Interrupted:
        progress.close()
        if rank == 0:
            saved = history.checkpoints.last_step
            begins = "begins anew" if saved is None else "goes on from there"
            print(f"Told to stop: saved after step {saved}. The same command {begins}.", flush=True)
        return EXIT_INTERRUPTED
    progress.close()
    if rank == 0:
        pictures = draw_importance(folder, sparse.times_active)
        print(report(sparse, history.evaluations, data, num_steps, [*written, *pictures]), flush=True)
        if peak:
            print(peak, flush=True)
    if failure is not None and config.substrate.merge is True:
        raise failure
    if failure is not None:  # nobody asked for a merge
        print(f"WARNING: {failure}", flush=True)
    return 0


@dataclass
class _Loop:
    """Steps, what is said of them, evaluations and checkpoints."""

    config: RunConfig
    engine: DeepSpeedEngine
    objective: Objective
    sparse: Sparse
    feed: Feed
    batches: Batches
    history: History
    progress: Progress
    num_steps: int
    interruption: Interruption
    meter: Meter

    def run(self) -> None:
        """All steps that are left. Raises `Interrupted` where a rank was told to stop, after a checkpoint."""
        config, history = self.config, self.history
        stopped = not self._evaluate()
        while not stopped and history.step < self.num_steps:
            result = self._step()
            history.step += 1
            stopped = config.saves and bool(result.told_to_stop)
            if not stopped and config.eval.every and history.step % config.eval.every == 0:
                stopped = not self._evaluate()
            # After the last step there is an evaluation first.
            if config.saves and history.step < self.num_steps and history.step % config.checkpoint.every == 0:
                self._save()
        if not stopped:
            stopped = not self._evaluate(last=True)
        last = history.evaluations.get(history.step, history.last_loss)
        if not stopped and not math.isfinite(last):
            raise self._stopped(f"the loss is {last}", step=history.step)
        if config.saves:
            self._save_finally()
        if stopped:
            raise Interrupted

    def _step(self) -> StepResult:
        config, step = self.config, self.history.step
        lr = self.engine.get_lr()[0]  # of this step; the engine's next one after it
        indices = self.batches.indices(step)
        try:
            result = train_step(self.engine, self.objective, self.feed.micro_batches(indices), self.interruption)
        except UpdateError as error:
            raise StoppedError(f"stopped at step {step + 1}: {error}; no model was written") from error
        except Exception as error:
            if "loss scale" not in str(error):  # DeepSpeed's plain Exception, at the smallest scale
                raise
            raise self._stopped(str(error)) from error
        self.meter.add(result)
        self._count_skipped(result)
        if (step + 1) % config.train.log_every == 0 or step + 1 == self.num_steps:
            rounded = {} if self.sparse.rounded_away is None else {"rounded_away": self.sparse.rounded_away}
            figures = self.meter.read(self.engine)
            self.history.last_loss = figures["loss"]
            figures |= rounded | self.sparse.update.figures()
            self.progress.step(step + 1, active=self.sparse.active, lr=lr, **figures)
        self.progress.importance(step + 1, self.sparse.selector.importance())
        return result

    def _count_skipped(self, result: StepResult) -> None:
        # Gradients that overflow in fp16 are the loss scale's way down, and DeepSpeed ends that at its minimum.
        fp16 = self.config.model.dtype == "fp16"
        fine = result.applied or (fp16 and bool(torch.isfinite(result.loss_sum)))
        self.history.skipped = 0 if fine else self.history.skipped + 1
        # ZeRO refuses steps with infinite or NaN gradients; stage 0 (the fp32 reference) takes them, weights and all.
        allowed = self.config.train.max_skipped_steps if self.engine.zero_optimization_stage() else 0
        if self.history.skipped > allowed:
            wanted = self.config.train.max_skipped_steps
            why = f"(train.max_skipped_steps is {wanted}"
            why += ")" if allowed == wanted else ", which ZeRO stage 0 cannot do)"
            raise self._stopped(f"{self.history.skipped} steps in a row had NaN or infinite loss or gradients {why}")

    def _evaluate(self, *, last: bool = False) -> bool:
        """Once for each step; False where a rank was told to stop meanwhile, and nothing came of it."""
        history, step = self.history, self.history.step
        if self.feed.has_evaluation and step not in history.evaluations and (last or step % self._evaluates_every == 0):
            with self.meter.paused():
                loss = evaluate(self.engine, self.objective, self.feed.eval_batches(), self.interruption)
            if loss is None:
                return False
            history.evaluations[step] = loss
            self.progress.evaluation(step, loss)
            if step and self.config.saves and history.checkpoints.is_best(step, loss):
                self._save()
        return True

    @property
    def _evaluates_every(self) -> int:
        return self.config.eval.every or self.num_steps

    def _save(self) -> None:
        with self.meter.paused():
            self._unless_it_fails(self.history.checkpoints.finish)  # an earlier one
            self._unless_it_fails(partial(self.history.save, self.meter))

    def _save_finally(self) -> None:
        """What was trained can be exported, and an earlier checkpoint gone on from, if this one cannot be written."""
        with self.meter.paused():
            for act in (
                self.history.checkpoints.finish,
                partial(self.history.save, self.meter),
                self.history.checkpoints.finish,
            ):
                self._unless_it_fails(act, stop=False)

    def _unless_it_fails(self, act: Callable[[], None], *, stop: bool | None = None) -> None:
        try:
            act()
        except LeaseError:  # it is another job's run by now
            raise
        except CheckpointError as error:
            if self.config.checkpoint.on_failure == "stop" if stop is None else stop:
                raise
            self.progress.say(f"WARNING: {error}")

    def _stopped(self, reason: str, *, step: int | None = None) -> StoppedError:
        """Of the step that is under way, or of `step`."""
        config, step = self.config, step or self.history.step + 1
        clipping = config.train.gradient_clipping
        clip = f"lower train.gradient_clipping ({clipping})" if clipping else "set train.gradient_clipping (0: none)"
        return StoppedError(
            f"stopped at step {step}: {reason}; no model was written. Lower optimizer.lr "
            f"({config.optimizer.lr}), {clip}, or look at the data"
        )


def _probing(engine: DeepSpeedEngine, objective: Objective, feed: Feed, sparse: Sparse) -> dict[str, Any]:
    """What `attach` wants for a selector that measures."""
    if not sparse.selector.measures:
        return {}
    return {
        "probe_batches": feed.probe_batches(),
        "loss_function": lambda module, batches: summed_over(engine, objective, batches),
    }


def _bytes_to_write(config: RunConfig, sparse: Sparse, exported: torch.nn.Module | None) -> int:
    """By rank 0 for all: the first checkpoint (master and two moments in fp32, of unmasked weights the place too),
    and the model in the end."""
    if dist.get_rank() != 0:
        return 0
    if config.update.name == "unmask":
        held = 28 * config.update.budget
    else:
        held = 12 * sum(full_numel(p) for p in sparse.trainable_parameters())
    checkpoint = held if config.saves else 0
    written = [] if exported is None else exported.parameters()
    return checkpoint + sum(full_numel(p) * p.element_size() for p in written)


def _check_fused(config: RunConfig, engine: DeepSpeedEngine, objective: Objective) -> None:
    try:
        check_fused(engine, objective)
    except LossError:
        if config.train.fused_loss is True:
            raise
        objective.fused = False  # it was not asked for
