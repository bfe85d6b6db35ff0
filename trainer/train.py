"""One run, from top to bottom: load, build, attach, resume, loop, export."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from transformers import PreTrainedTokenizerBase, get_scheduler

from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.identity import identity_of
from trainer.cluster.together import check_nodes
from trainer.config import RunConfig, total_steps, warmup_steps
from trainer.config.deepspeed.resolve import resolve
from trainer.config.text import printable
from trainer.data.cache import TokenisedData, tokenise_run
from trainer.data.pictures import run_pictures
from trainer.data.rank_batches import RankBatches
from trainer.data.show import describe as describe_data
from trainer.data.tokenizer import load_run_tokenizer, padding_id
from trainer.engine.sparse import Sparse
from trainer.export.from_engine import RankZeroSteps, save
from trainer.model.adapters import choose_merge
from trainer.model.loss import Objective
from trainer.model.quiet import quiet_libraries
from trainer.planner.watch import PeakWatch
from trainer.run import setup
from trainer.run.folder import RunFolder, move_tensorboard, start_run_folder
from trainer.run.importance_plot import draw_importance
from trainer.run.interruption import EXIT_INTERRUPTED, Interrupted, Interruption
from trainer.run.loop import Loop
from trainer.run.model_checks import check_model
from trainer.run.progress import Meter, Progress
from trainer.run.rank_watch import RankWatch
from trainer.run.remarks import image_remarks, new_token_lines, one_line, report, rounding_warning, title, warnings
from trainer.run.resuming import FinishedError
from trainer.run.step import summed_over
from trainer.run.swap_folder import own_swap_folder
from trainer.run.training_record import TrainingRecord


def run(config: RunConfig, interruption: Interruption, watch: RankWatch) -> int:
    """Train according to `config` and write the run folder. Returns the exit code. Runs on every rank."""
    quiet_libraries()
    watch.meet(timedelta(minutes=config.train.timeout_minutes))
    # Data first: a process group could time out while rank 0 tokenises.
    tokenizer = load_run_tokenizer(config.model)
    data = tokenise_run(config, tokenizer)
    setup.initialise_process_group(timeout_minutes=config.train.timeout_minutes)
    check_nodes(Path(config.output))
    try:
        ds = resolve(config, dist.get_world_size())
        with start_run_folder(config, data.fingerprints, watch) as folder, own_swap_folder(ds) as ds:
            code = _train(config, ds, tokenizer, data, folder, interruption)
    except FinishedError as finished:
        code = 0
        if dist.get_rank() == 0:
            print(printable(str(finished)), flush=True)
    dist.barrier()  # otherwise a rank that finishes first looks dead to the others
    watch.finish()
    # Only after success: after a failure this could wait for ranks that never arrive.
    torch.distributed.destroy_process_group()
    return code


def _train(
    config: RunConfig,
    ds: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    data: TokenisedData,
    folder: RunFolder,
    interruption: Interruption,
) -> int:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    setup.check_hardware(config)
    num_steps = total_steps(config, len(data.train))

    # Plan: before ZeRO-3 is active, under which transformers would partition the planner's models.
    watch = PeakWatch(config)

    # Build: the model with adapters, all but the first active set frozen; its optimizer and schedule; the data's order.
    built = setup.build_model(config, ds, tokenizer, num_steps=num_steps, empty=False)
    sparse, ds = built.sparse, built.ds
    setup.check_images(data, built.base)
    merge, remarks = choose_merge(config, built.adapters)
    torch.manual_seed(config.seed + rank)  # dropout differs between ranks
    objective = Objective(built.base, fused=built.loss.fused, router_loss=config.train.router_loss, deepspeed=ds)
    optimizer = setup.build_optimizer(config, sparse, offload=setup.offload_device(ds, "optimizer") != "none")
    scheduler = get_scheduler(config.schedule.name, optimizer, warmup_steps(config, num_steps), num_steps)
    # FlashAttention keeps packed samples apart in one flat row.
    flat = built.base.config.get_text_config()._attn_implementation == "flash_attention_2"
    feed = RankBatches(config, data, pad_id=padding_id(tokenizer), flat=flat, pictures=run_pictures(config.model))
    batches = setup.build_batches(config, data, rank=rank, ranks=ranks)

    # Attach: DeepSpeed's engine, whose optimizer follows the active set from here on.
    move_tensorboard(ds, config, folder.path)
    engine, *_ = deepspeed.initialize(model=built.model, optimizer=optimizer, lr_scheduler=scheduler, config=ds)
    probing = _probing(engine, objective, feed, sparse)
    sparse.attach(engine, guard_every=config.train.guard_every, saves=config.saves, **probing)
    engine.train()
    loss = check_model(config, engine, sparse, objective) or built.loss

    # Resume: continue an interrupted run, if there is one.
    identity = identity_of(built.model, tokenizer, blocks=sparse.structure.path)
    checkpoints = Checkpoints(
        sparse,
        folder.path,
        identity=identity,
        keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous,
        lease=folder.lease,
    )
    job = folder.lease.holder.job if folder.lease is not None else None
    history = TrainingRecord(checkpoints, config, batches, scheduler, job=job)
    meter = Meter()
    resumed = history.resume(folder.origin, meter)
    folder.record(config)
    needed = setup.bytes_to_write(config, built, merge=merge) if rank == 0 else 0
    checkpoints.require_space(needed, "this run needs at least")

    # Print the method and the model, what trains, on which data, and how much memory it needs.
    progress = Progress(folder.path, engine=engine, total_steps=num_steps, rank=rank, first_step=history.step)
    for line in [
        title(config, built, ranks),
        f"run folder {folder.path}: {one_line(sparse, config, num_steps)}",
        *folder.remarks,
        *describe_data(data, config.data.max_length),
        *new_token_lines(config, tokenizer, sparse),
        str(loss),
        *watch.start(fused=loss.fused),
        *remarks,
        *built.warnings,
        *warnings(config, sparse, num_steps),
        *image_remarks(data, sparse),
        *rounding_warning(config, sparse),
        *resumed,
    ]:
        progress.say(line)

    def check_continues() -> None:
        """Raise `Interrupted` or `LeaseError` if the run must end; called on all ranks between blocks of an export."""
        if config.saves:
            interruption.check(engine.device)
        folder.check_lease()

    # Loop, and export what was trained.
    interruption.remember()
    loop = Loop(config, engine, objective, sparse, feed, batches, history, progress, num_steps, interruption, meter)
    try:
        loop.run()
        peak, figures = watch.result()
        progress.summary(history.step, **figures)
        pictures = _draw(folder.path, sparse, progress) if rank == 0 else []
        step = RankZeroSteps(check_continues, folder.publishing)
        exported, failure = save(engine, tokenizer, folder.path, built.adapters, merge=merge, step=step)
    except Interrupted:
        progress.close()
        if rank == 0:
            print(_interrupted(config, checkpoints.last_step), flush=True)
        return EXIT_INTERRUPTED

    # Report.
    progress.close()
    if rank == 0:
        print(printable(report(sparse, history.evaluations, data, num_steps, [*exported, *pictures])), flush=True)
        if peak:
            print(peak, flush=True)
    if failure is not None and config.must_merge:
        raise failure
    if failure is not None and rank == 0:
        print(f"WARNING: {printable(str(failure))}", flush=True)
    return 0


def _interrupted(config: RunConfig, saved: int | None) -> str:
    """Return the last line of a run that was asked to stop; `saved`: the step of its last checkpoint (None: none)."""
    outcome = "nothing was saved yet" if saved is None else f"saved after step {saved}"
    next_start = "starts anew" if saved is None or config.resume == "never" else "resumes there"
    return f"Told to stop: {outcome}. The same command {next_start}."


def _probing(engine: DeepSpeedEngine, objective: Objective, feed: RankBatches, sparse: Sparse) -> dict[str, Any]:
    """Return the extra arguments of `attach` for a selector that measures."""
    if not sparse.selector.measures:
        return {}
    return {
        "probe_batches": feed.probe_batches(),
        "loss_function": lambda module, batches: summed_over(engine, objective, batches),
    }


def _draw(folder: Path, sparse: Sparse, progress: Progress) -> list[tuple[str, Path]]:
    """Draw the importance of the blocks. A failure is only reported, since the run must still export its model."""
    try:
        return draw_importance(folder, sparse.times_active)
    except Exception as error:
        progress.say(f"WARNING: the picture of importance could not be drawn: {type(error).__name__}: {error}")
        return []
