"""Load small models as a run does, and look at their weights."""

from __future__ import annotations

from typing import Any

import deepspeed
from torch import Tensor
from transformers import PreTrainedModel

from trainer.config.schema import ModelConfig
from trainer.data.tokenizer import bytes_tokenizer
from trainer.model import load as models

TOKENS = len(bytes_tokenizer())


def settings(stage: int = 2) -> dict[str, Any]:
    """Return what DeepSpeed needs to partition a model while it is created."""
    return {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": False}}


def load(stage: int = 2, *, seed: int = 0, **config: Any) -> PreTrainedModel:
    chosen = ModelConfig(**{"dtype": "fp32", **config})
    return models.load(chosen, bytes_tokenizer(), seed=seed, deepspeed=settings(stage))


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return full weights, gathered if they are partitioned."""
    full = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            full[name] = parameter.detach().clone()
    return full
