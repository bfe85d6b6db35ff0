"""Try a model on a few tokens before a run: is it causal, and does the fused loss fit it."""

from __future__ import annotations

from deepspeed import DeepSpeedEngine

from trainer.config import RunConfig
from trainer.engine.sparse import Sparse
from trainer.model.causality import check_causal
from trainer.model.loss import LossChoice, LossError, Objective, check_fused


def check_model(config: RunConfig, engine: DeepSpeedEngine, sparse: Sparse, objective: Objective) -> LossChoice | None:
    """Check that each token sees only earlier ones of its sample, and try the fused loss. Training is not affected.

    Returns another choice if the fused loss turns out not to fit. Raises `LossError`.
    """
    with sparse.inspecting():
        key = "model.path" if config.model.path is not None else "model.random"
        check_causal(engine.module, packed=config.data.packing, key=key, device=engine.device)
    if not objective.fused:
        return None
    # In a context of its own: ZeRO-3 would prefetch the head in the order that the plain forward above has recorded,
    # while the fused head gathers it by itself.
    with sparse.inspecting():
        return try_fused(config, engine, objective)


def try_fused(config: RunConfig, engine: DeepSpeedEngine, objective: Objective) -> LossChoice | None:
    """Return another choice if the fused loss does not fit. Raises `LossError` if it was requested explicitly."""
    try:
        check_fused(engine, objective)
    except LossError as error:
        if config.train.fused_loss is True:
            raise
        objective.use_plain()  # auto: fall back to the plain loss
        return LossChoice(False, f"train.fused_loss: auto, but it was tried and does not fit: {error}")
    return None
