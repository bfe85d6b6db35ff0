"""The state of DeepSpeed's dynamic loss scaler (fp16), which checkpoints contain."""

from __future__ import annotations

from collections.abc import Mapping

from deepspeed.runtime.engine import DeepSpeedEngine

# What changes in a DynamicLossScaler; the rest is configuration.
_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scale_state(engine: DeepSpeedEngine) -> dict[str, float]:
    """Return the state of the loss scaler; empty if there is none."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {k: v for k, v in vars(scaler).items() if k in _STATE} if scaler is not None else {}


def restore_loss_scale(engine: DeepSpeedEngine, state: Mapping[str, float]) -> None:
    """Restore what `loss_scale_state` returned."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None:
        vars(scaler).update(state)
