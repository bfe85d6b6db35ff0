"""The state of an engine besides tensors: its counters, its learning rates and its loss scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed import DeepSpeedEngine

from trainer.engine.zero.loss_scale import loss_scale_state, restore_loss_scale

# Attributes of DeepSpeed's engine that count steps and samples.
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def engine_state(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Return the state of `engine` as JSON-compatible values."""
    return {
        "learning_rates": [float(group["lr"]) for group in engine.basic_optimizer.param_groups],
        "engine": {name: getattr(engine, name) for name in _COUNTERS},
        "loss_scale": loss_scale_state(engine),
    }


def restore_engine_state(engine: DeepSpeedEngine, state: Mapping[str, Any]) -> None:
    """Restore what `engine_state` returned."""
    for name in _COUNTERS:
        setattr(engine, name, state["engine"][name])
    # A step ends when `micro_steps` is a multiple of the accumulation steps, whose number may have changed.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    for group, rate in zip(engine.basic_optimizer.param_groups, state["learning_rates"], strict=True):
        group["lr"] = rate
    restore_loss_scale(engine, state["loss_scale"])
