"""Take over the optimizer of an engine, whatever its ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from trainer.engine.zero.errors import RegistrationError
from trainer.engine.zero.registration import Registration
from trainer.engine.zero.stage0 import Stage0
from trainer.engine.zero.stage3 import Stage3
from trainer.engine.zero.stage12 import Stage1And2


def register(engine: DeepSpeedEngine, groups: Sequence[Mapping[str, nn.Parameter]]) -> Registration:
    """Take over the optimizer of `engine`, so that `groups[i]` can be refilled later.

    An engine that was built with other groups (more trainable, for instance) is rebuilt once, in place: every
    holder of its optimizer stays valid. Raises `RegistrationError` for an engine that cannot be switched.
    """
    optimizer = engine.optimizer
    extended: Sequence[Mapping[str, Any]] = groups  # with the attributes that `parameters` declares for the stage
    if type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        return Stage3(engine, extended)
    if type(optimizer) is DeepSpeedZeroOptimizer:
        return Stage1And2(engine, extended)
    if optimizer is engine.basic_optimizer and engine.zero_optimization_stage() == 0:
        return Stage0(engine, groups)
    raise RegistrationError(
        f"cannot switch layers under {type(optimizer).__name__} (ZeRO stage {engine.zero_optimization_stage()}): "
        "use ZeRO stage 1, 2 or 3, or stage 0 in fp32. For stage 1 in bf16 set data_types.grad_accum_dtype to bf16 "
        "in the DeepSpeed configuration"
    )
