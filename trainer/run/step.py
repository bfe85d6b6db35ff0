"""Take one optimizer step, or evaluate once, over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist

from trainer.data.batches import count_targets, count_tokens
from trainer.model.loss import Objective
from trainer.run.interruption import Interruption


@dataclass
class StepResult:
    """Sums over all ranks of one optimizer step, fp32 scalars on the device, which nothing has waited for yet."""

    loss_sum: torch.Tensor
    targets: torch.Tensor
    tokens: torch.Tensor  # without padding
    applied: bool
    must_stop: torch.Tensor  # above 0 if any rank was


def train_step(
    engine: DeepSpeedEngine,
    objective: Objective,
    micro_batches: list[dict[str, torch.Tensor]],
    interruption: Interruption | None = None,
) -> StepResult:
    """Take one optimizer step on the mean loss over the target tokens of all ranks and micro-batches. Collective.

    DeepSpeed averages over ranks, so each rank's sum is scaled by ranks / global count. The result then depends on
    neither ranks nor accumulation nor padding. A router's loss is a mean over micro-batches instead.
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
    # Read at the end, so that the step during which the signal arrived is the last one.
    told = loss_sum.new_tensor(float(interruption is not None and interruption.received))
    sums = torch.stack([loss_sum, told])
    dist.all_reduce(sums)
    loss_sum, must_stop = sums
    return StepResult(loss_sum, targets, tokens, _applied(engine, loss_sum), must_stop)


def _applied(engine: DeepSpeedEngine, loss_sum: torch.Tensor) -> bool:
    if engine.zero_optimization_stage() == 0:
        return engine.was_step_applied() and bool(torch.isfinite(loss_sum))
    return engine.was_step_applied()


@torch.no_grad()
def evaluate(
    engine: DeepSpeedEngine,
    objective: Objective,
    batches: list[dict[str, torch.Tensor]],
    interruption: Interruption | None = None,
) -> float | None:
    """Compute the mean loss over the target tokens of the batches of all ranks. Collective.

    Returns None if a rank is told to stop meanwhile.
    """
    engine.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    stopped = False
    try:
        for batch in batches:
            if interruption is not None and interruption.anywhere(engine.device):
                stopped = True
                break
            loss, count = summed_over(engine, objective, [batch])
            sums += torch.stack([loss, loss.new_tensor(count)])
    finally:
        engine.train()
    if stopped:
        return None
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def summed_over(
    engine: DeepSpeedEngine, objective: Objective, batches: list[dict[str, torch.Tensor]]
) -> tuple[torch.Tensor, int]:
    """Return the loss summed over this rank's target tokens of `batches` (fp64), and their number."""
    total, count = torch.zeros((), dtype=torch.float64, device=engine.device), 0
    for batch in batches:
        count += count_targets(batch["labels"])
        loss, _ = objective(engine, {key: value.to(engine.device) for key, value in batch.items()})
        total += loss.double()
    return total, count
