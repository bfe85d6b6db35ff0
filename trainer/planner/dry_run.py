"""The dry run: what a run would train, and what each rank would store."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator

from trainer.accounting import readable
from trainer.config import RunConfig, dump, total_steps, warmup_steps
from trainer.config.deepspeed.resolve import resolve
from trainer.data.cache import tokenise_run
from trainer.data.show import describe as describe_data
from trainer.data.tokenizer import load_run_tokenizer
from trainer.model import load as models
from trainer.model.adapters import choose_merge
from trainer.model.quiet import quiet_libraries
from trainer.planner import Planner
from trainer.planner.report import one_line as planned
from trainer.run.folder import would_resume
from trainer.run.remarks import new_token_lines, one_line, warnings
from trainer.run.resuming import FinishedError
from trainer.run.setup import build_batches, build_model, check_hardware, offload_device

# The column of names.
_WIDTH = 15


def describe(config: RunConfig, ranks: int) -> str:
    """Return what a run on `ranks` ranks would train and store, from a model on the meta device. Trains nothing."""
    quiet_libraries()
    tokenizer = load_run_tokenizer(config.model)
    data = tokenise_run(config, tokenizer)
    batches = build_batches(config, data, rank=0, ranks=ranks)
    finished = []
    try:
        resumed = would_resume(config, data.fingerprints)
        if resumed is not None:
            batches.resume(resumed.data)
    except FinishedError as error:
        finished = [str(error)]
    ds = resolve(config, ranks)
    check_hardware(config)
    base = models.on_meta(config.model, tokenizer)
    remarks = [*finished, *models.check_files(config.model, base)]
    num_steps = total_steps(config, len(data.train))
    warmup_steps(config, num_steps)  # raises if there are more than that
    built = build_model(config, ds, tokenizer, num_steps=num_steps, empty=True, base=base)
    remarks += [*choose_merge(config, built.adapters)[1], *built.warnings]
    sparse, stage = built.sparse, ds["zero_optimization"]["stage"]
    plan = Planner(on_cpu=get_accelerator().device_name() == "cpu").plan_built(config, ranks, built)
    state = plan.state
    lines = [dump(config).rstrip(), ""]
    lines += [*remarks, *warnings(config, sparse, num_steps)]
    lines += [f"data: {line}" for line in describe_data(data, config.data.max_length)]
    lines += new_token_lines(config, tokenizer, sparse)
    lines.append(f"steps: {num_steps} of {config.train.global_batch_size} sequences")
    lines.append(f"model: {sum(p.numel() for p in built.model.parameters()):,} parameters")
    lines.append(
        f"blocks: {len(sparse.blocks)} at {sparse.structure.path}, {sparse.blocks[0].numel:,} parameters in the first"
    )
    for part, parameters in sparse.always_on.items():
        count = sum(p.numel() for p in parameters.values())
        lines.append(f"always on: {part}, {count:,} parameters ({', '.join(parameters)})")
    trained = sum(p.numel() for p in sparse.trainable_parameters())
    what = f"{trained:,}" if plan.trained == trained else f"{plan.trained:,} of {trained:,}"
    lines.append(f"trained at a time: {what} parameters; {one_line(sparse, config, num_steps)}")
    lines.append(f"each of {ranks} ranks stores, under ZeRO stage {stage} and without activations and buffers:")
    places = {"none": "", "cpu": " in host memory", "nvme": " on NVMe"}
    for name in ("weights", "gradients", "masters", "moments", *(["indices"] if state.indices else [])):
        device = offload_device(ds, "param" if name == "weights" else "optimizer")
        # Gradients stay in host memory until the step swaps their group in.
        where = places["cpu" if name == "gradients" and device == "nvme" else device]
        lines.append(f"  {name:<{_WIDTH}}{readable(getattr(state, name)):>12}{where}")
    lines.append(f"  {'total':<{_WIDTH}}{readable(state.total):>12}")
    for extra in plan.rule.backward:
        lines.append(f"  {extra.name:<{_WIDTH}}{readable(extra.size):>12} more in backward{extra.when}")
    if plan.banked:
        where = " in host memory" if config.bank.place == "host" else ""
        lines.append(f"  {'bank':<{_WIDTH}}{readable(plan.banked):>12}{where} more, once all blocks have been drawn")
    lines += [str(plan.loss), *plan.notes, planned(plan)]
    return "\n".join(lines)
