"""Check an engine before its optimizer is taken over, and build its groups anew if they are not the ones wanted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from trainer.engine.zero.errors import RegistrationError
from trainer.engine.zero.parameters import P
from trainer.engine.zero.private_names import READ_IN_VERSION, missing_names
from trainer.model.blocks import full_numel


class Groups(Protocol[P]):
    """The groups that an optimizer is to have, and the steps of a rebuild that depend on the ZeRO stage."""

    engine: DeepSpeedEngine
    optimizer: Any
    groups: list[dict[str, P]]

    def registered(self) -> list[list[P]]:
        """Return the parameters that the optimizer steps, by group."""

    def dispose(self) -> None:
        """Free the memory of the old ZeRO optimizer."""

    def own_storage(self, parameters: Iterable[P]) -> None:
        """Give parameters that are views of a flat buffer storage of their own, so that the buffer can be freed."""

    def build(self) -> None:
        """Make a new ZeRO optimizer around the same basic optimizer."""


def check_names(engine: DeepSpeedEngine, stage: str) -> None:
    """Raise `RegistrationError` if this DeepSpeed lacks a private name that the switch uses."""
    missing = missing_names(engine, stage)
    if missing:
        raise RegistrationError(
            f"DeepSpeed {deepspeed.__version__} has no {', '.join(missing)}; Strata's switch was written for "
            f"{READ_IN_VERSION}: install deepspeed=={READ_IN_VERSION}"
        )


def check_settings(engine: DeepSpeedEngine, stage: str) -> None:
    """Raise `RegistrationError` for settings of DeepSpeed that cannot be switched on any ZeRO stage."""
    zero, basic = engine.optimizer, engine.basic_optimizer
    if stage == "stage 0":
        return
    if zero.optimizer is not basic:
        raise RegistrationError(
            f"DeepSpeed steps a {type(zero.optimizer).__name__} of its own in place of the {type(basic).__name__} "
            "that it was given: use torch.optim.AdamW or DeepSpeedCPUAdam"
        )
    chosen: dict[str, object] = {
        "optimizer Muon": type(basic).__module__.startswith("deepspeed.") and "Muon" in type(basic).__name__,
        "zero_optimization.zenflow": zero.zenflow,
        "bf16_master_weights_and_grads": zero.bf16_master_weights_and_gradients,
        "fp16_master_weights_and_grads": zero.fp16_master_weights_and_gradients,
    }
    if stage == "stage 3":
        if zero.offload_optimizer and zero.partial_offload != 1.0:  # without offload the ratio means nothing
            chosen["zero_optimization.offload_optimizer.ratio below 1"] = f"{zero.partial_offload}"
        chosen["zero_optimization.zero_quantized_nontrainable_weights"] = zero.zero_quantized_nontrainable_weights
    for key, value in chosen.items():
        if value:
            raise RegistrationError(f"{key} (here {value}) cannot be switched: leave it out")


def matches(wanted: Groups[P]) -> bool:
    """Return whether the optimizer has exactly the groups wanted."""
    live = [[id(p) for p in group] for group in wanted.registered()]
    return live == [[id(p) for p in group.values()] for group in wanted.groups]


def rebuild(wanted: Groups[P]) -> None:
    """Give the optimizer the groups wanted, around the same basic optimizer. Raises `RegistrationError` if it has
    trained already, or if a scheduler counts its groups."""
    engine, basic = wanted.engine, wanted.engine.basic_optimizer
    if engine.global_steps:
        raise RegistrationError(
            f"this engine has trained {engine.global_steps} steps with other groups, and their optimizer state would "
            "be lost: attach before the first step"
        )
    scheduled = engine.lr_scheduler is not None or hasattr(basic.step, "_wrapped_by_lr_sched")
    if len(basic.param_groups) != len(wanted.groups) and scheduled:
        raise RegistrationError(
            f"this engine's optimizer has {len(basic.param_groups)} groups and a learning-rate scheduler that counts "
            f"them, switching needs {len(wanted.groups)}: build the optimizer from sparse.param_groups(), or the "
            "scheduler after attach"
        )
    live = wanted.registered()
    settings = [_settings_of(group, live, wanted.optimizer, basic) for group in wanted.groups]
    _set_requires_grad(wanted.groups, live)
    held = [parameter for group in live for parameter in group]
    wanted.dispose()
    basic.state.clear()
    wanted.own_storage(held)  # after masters and moments are gone: what is cloned here must not raise the peak
    basic.param_groups[:] = [
        {**chosen, "params": list(group.values())} for chosen, group in zip(settings, wanted.groups, strict=True)
    ]
    wanted.build()
    if not matches(wanted):
        raise RegistrationError(
            "DeepSpeed split an optimizer group: set zero_optimization.sub_group_size to at least "
            f"{max(sum(full_numel(p) for p in g.values()) for g in wanted.groups)} elements"
        )


def _settings_of(
    group: Mapping[str, nn.Parameter], live: Sequence[Sequence[nn.Parameter]], zero: Any, basic: Any
) -> dict[str, Any]:
    """Return the hyper-parameters that the old groups gave to the first parameter of `group`, or the defaults."""
    first = next(iter(group.values()))
    owner = next((i for i, parameters in enumerate(live) if any(p is first for p in parameters)), None)
    if owner is None:
        return dict(basic.defaults)
    source = getattr(zero, "sub_group_to_group_id", {}).get(owner, owner)  # stage 3 may split groups
    return {key: value for key, value in basic.param_groups[source].items() if key != "params"}


def _set_requires_grad(groups: Sequence[Mapping[str, nn.Parameter]], live: Sequence[Sequence[nn.Parameter]]) -> None:
    wanted = {id(p) for group in groups for p in group.values()}
    for parameters in live:
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in wanted)
    for group in groups:
        for parameter in group.values():
            parameter.requires_grad_(True)
