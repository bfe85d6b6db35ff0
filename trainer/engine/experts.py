"""Set ZeRO up for mixtures of experts whose experts are modules of their own, in a list.

Ranks send their tokens to different experts. If ZeRO handles experts one by one, a rank waits for one that the other
ranks do not call. (Most of transformers' experts are stacked in one parameter and need nothing.)
"""

from __future__ import annotations

from deepspeed import DeepSpeedEngine
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from trainer.engine.zero.errors import RegistrationError
from trainer.settings.updates import REGISTRY as UPDATES

# The rules that leave whole tensors to DeepSpeed's optimizer.
_WHOLE = " or ".join(name for name, settings in UPDATES.items() if not settings.own_state)


def gather_experts_together(model: nn.Module) -> None:
    """Let ZeRO-3 gather and reduce all experts of a layer at once. Call it before `deepspeed.initialize`."""
    holders = _holders(model)
    if holders:
        set_z3_leaf_modules(model, holders)


def refuse_waiting_experts(engine: DeepSpeedEngine, *, sparse_rule: bool = False) -> None:
    """Raise `RegistrationError` on stages 1 and 2, which have no such setting: a rank would hang. With an update rule
    that reduces gradients itself, one by one, raise it on every stage."""
    stage = engine.zero_optimization_stage()
    if engine.world_size == 1 or not _holders(engine.module):
        return
    if sparse_rule:
        raise RegistrationError(
            "update.name: a sparse update rule waits for experts that a rank sends no token, and this model's experts "
            f"are modules of their own: set update.name={_WHOLE}, or train on one rank"
        )
    if stage in (1, 2):
        raise RegistrationError(
            f"deepspeed: ZeRO stage {stage} waits for experts that a rank sends no token, and this model's experts are "
            "modules of their own: set deepspeed=zero3"
        )


def _holders(model: nn.Module) -> list[type[nn.Module]]:
    """Return the classes of the modules that contain a list of experts. DeepSpeed's own marks say less: stacked experts
    have them as well."""
    return list(
        {
            type(module)
            for module in model.modules()
            if any(name == "experts" and isinstance(child, nn.ModuleList) for name, child in module.named_children())
        }
    )
