"""trainer/config/schema.py: models that hold by themselves, documented keys, schedules that transformers builds."""

from typing import get_args

import pytest

from trainer.config.keys import allowed, keys
from trainer.config.schema import RunConfig, ScheduleName


def test_direct_construction_expands_and_checks_too() -> None:
    values = {"train": {"steps": 3, "global_batch_size": 2}, "data": {"train": "x"}, "model": {"path": "x/y"}}
    assert RunConfig(method="badam", **values).selector.name == "cyclic"
    with pytest.raises(ValueError, match="train.steps, train.epochs: both given"):
        RunConfig(**{**values, "train": {"steps": 3, "epochs": 1.0, "global_batch_size": 2}})


def test_every_key_has_a_sentence_and_allowed_values() -> None:
    for key in keys(RunConfig):
        assert (key.field.description or "").endswith(".") and allowed(key.field), key.path


def test_every_schedule_is_one_of_transformers_and_needs_no_more() -> None:
    import torch
    from transformers import SchedulerType, get_scheduler

    for name in get_args(ScheduleName):
        assert name in [member.value for member in SchedulerType]
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        schedule = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=10)
        rates = []
        for _ in range(10):
            optimizer.step()
            schedule.step()
            rates.append(schedule.get_last_lr()[0])
        assert max(rates) <= 1e-3 * 1.0001 and min(rates) >= 0
