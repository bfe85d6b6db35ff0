"""The state of DeepSpeed's dynamic loss scaler (fp16), which checkpoints contain."""

from __future__ import annotations

from collections.abc import Mapping

from deepspeed.runtime.engine import DeepSpeedEngine

from trainer.engine.zero.private_names import PRIVATE_NAMES

_STATE = PRIVATE_NAMES["dynamic loss scaler"]


def loss_scale_state(engine: DeepSpeedEngine) -> dict[str, float]:
    """Return the state of the loss scaler; empty if the scale is constant, as it is for every dtype but fp16."""
    return {name: getattr(engine.optimizer.loss_scaler, name) for name in _STATE} if _is_dynamic(engine) else {}


def restore_loss_scale(engine: DeepSpeedEngine, state: Mapping[str, float]) -> None:
    """Restore what `loss_scale_state` returned. A constant scale is configuration, and stays what it is."""
    for name in _STATE:
        if name in state and _is_dynamic(engine):
            setattr(engine.optimizer.loss_scaler, name, state[name])


def _is_dynamic(engine: DeepSpeedEngine) -> bool:
    return engine.fp16_enabled() and engine.optimizer.dynamic_loss_scale
