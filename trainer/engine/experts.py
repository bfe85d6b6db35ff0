"""Set ZeRO up for mixtures of experts whose experts are modules of their own, in a list.

Ranks send their tokens to different experts, and an expert without tokens gets no gradient. If ZeRO handled experts one
by one, a rank would wait for one that the other ranks do not call, or their gradients would be added in different
orders. So all experts of a layer are handled together. (Most of transformers' experts are stacked in one parameter and
need nothing.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from torch.func import functional_call

from trainer.engine.zero.errors import RegistrationError
from trainer.settings.updates import REGISTRY as UPDATES

# The rules that leave whole tensors to DeepSpeed's optimizer.
_WHOLE = " or ".join(name for name, settings in UPDATES.items() if not settings.own_state)


def gather_experts_together(model: nn.Module) -> None:
    """Let ZeRO-3 gather and reduce all experts of a layer at once. Call it before `deepspeed.initialize`."""
    kinds = list({type(module) for module in _holders(model)})
    if kinds:
        set_z3_leaf_modules(model, kinds)


def reduce_experts_together(engine: DeepSpeedEngine, *, sparse_rule: bool) -> None:
    """Below ZeRO-3, give all experts of a layer a gradient in every backward, at once and in the same order on all
    ranks; those without tokens get zeros.

    Raises `RegistrationError` on stage 3 for an update rule that reduces gradients itself, one by one.
    """
    holders = list(_holders(engine.module))
    if engine.world_size == 1 or not holders:
        return
    if engine.zero_optimization_stage() < 3:
        for holder in holders:
            _reduce_together(holder)
    elif sparse_rule:
        raise RegistrationError(
            "update.name: under ZeRO stage 3 a sparse update rule waits for experts that a rank sends no token, and "
            f"this model's experts are modules of their own: set update.name={_WHOLE}, or deepspeed=zero2"
        )


def _reduce_together(holder: nn.Module) -> None:
    original = _Forward(holder)

    def forward(*args: Any, **kwargs: Any) -> Any:
        trained = {
            f"experts.{name}": parameter
            for name, parameter in holder.get_submodule("experts").named_parameters()
            if parameter.requires_grad
        }
        if not trained or not torch.is_grad_enabled():
            return original(*args, **kwargs)
        stand_ins = dict(zip(trained, _Together.apply(*trained.values()), strict=True))
        return functional_call(original, {f"holder.{name}": tensor for name, tensor in stand_ins.items()}, args, kwargs)

    holder.forward = forward


class _Forward(nn.Module):
    """Calls the forward of `holder` as it is now, without its hooks."""

    def __init__(self, holder: nn.Module) -> None:
        super().__init__()
        self.holder = holder
        self._forward = holder.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


class _Together(torch.autograd.Function):
    """Pass parameters on. Its backward runs when all their gradients are there, and receives zeros for unused ones."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def _holders(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that contain a list of experts. DeepSpeed's own marks say less: stacked experts have them as
    well."""
    for module in model.modules():
        if any(name == "experts" and isinstance(child, nn.ModuleList) for name, child in module.named_children()):
            yield module
