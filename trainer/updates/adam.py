"""Apply Adam to some of a parameter's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdamSettings:
    """Adam (arXiv 1412.6980); with `decoupled` weight decay AdamW (arXiv 1711.05101), else decay joins the gradient."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True


def adam_step_(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    *,
    step: Tensor | int,
    lr: float,
    settings: AdamSettings,
    weight_decay: float,
) -> None:
    """Take a step in place; all tensors are fp32 [n]. `step` counts from 1: one for all weights, or one for each [n].

    theta <- theta - lr * m_hat / (sqrt(v_hat) + eps), m_hat = m / (1 - beta1^step), v_hat = v / (1 - beta2^step).
    """
    (beta1, beta2), eps = settings.betas, settings.eps
    if settings.decoupled:
        master.mul_(1 - lr * weight_decay)
    elif weight_decay:
        gradient = gradient.add(master, alpha=weight_decay)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    if isinstance(step, int):
        denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
        master.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    else:
        counts = step.double()
        correction1, correction2 = (1 - beta1**counts).to(master.dtype), (1 - beta2**counts).sqrt().to(master.dtype)
        denominator = exp_avg_sq.sqrt().div_(correction2).add_(eps)
        master.sub_(exp_avg.div(correction1).div_(denominator), alpha=lr)


def zeros_like(values: Tensor) -> dict[str, Tensor]:
    """Return fresh moments for `values`."""
    return {"exp_avg": torch.zeros_like(values), "exp_avg_sq": torch.zeros_like(values)}
