"""trainer/config/schema.py: models that hold by themselves, documented keys, schedules that transformers builds."""

from typing import get_args

import pytest

from trainer.config.keys import Key, allowed, keys
from trainer.config.methods import ALL_ON, METHODS
from trainer.config.schema import RunConfig, ScheduleName
from trainer.config.sources import FORMATS

REQUIRED = {"train": {"steps": 3, "global_batch_size": 2}, "data": {"train": "x"}, "model": {"path": "x/y"}}


def test_direct_construction_expands_and_checks_too() -> None:
    values = dict(REQUIRED)
    assert RunConfig(method="badam", **values).selector.name == "cyclic"
    with pytest.raises(ValueError, match="train.steps, train.epochs: both given"):
        RunConfig(**{**values, "train": {"steps": 3, "epochs": 1.0, "global_batch_size": 2}})


def test_every_key_has_a_sentence_and_allowed_values() -> None:
    for key in keys(RunConfig):
        assert (key.field.description or "").endswith(".") and allowed(key.field), key.path


def described(path: str, member: str | None = None) -> Key:
    return next(key for key in keys(RunConfig) if key.path == path and key.member == member)


def test_methods_and_formats_are_those_of_their_registries() -> None:
    assert allowed(described("method").field).split(" | ") == [*METHODS, "null"]
    key = described("data.train[].format")
    assert allowed(key.field).split(" | ") == ["auto", *FORMATS]
    for name, text in FORMATS.items():
        assert f"{name}: {text}" in (key.field.description or "")


def test_defaults_that_depend_on_the_substrate_are_described() -> None:
    """`method` may be absent with adapters: then neither the bank nor what is always on is LISA's."""
    full, adapters = (
        RunConfig(**REQUIRED),
        RunConfig(**REQUIRED, substrate={"name": "adapter", "peft": {"peft_type": "IA3"}}),
    )
    assert full.bank.name == "discard" and full.always_on.model_dump() == {
        **dict.fromkeys(ALL_ON, True),
        "projector": False,
    }
    assert adapters.bank.name == "device" and set(adapters.always_on.model_dump().values()) == {False}
    assert adapters.selector == full.selector == RunConfig(**REQUIRED, method="lisa").selector
    for part in ("embeddings", "head", "norm"):
        text = described(f"always_on.{part}").field.description or ""
        assert text.endswith("The default is false with substrate.name=adapter.")
    discard = described("bank.name", "discard").field.description or ""
    assert discard.endswith("With substrate.name=adapter the default is device.")
    method = described("method").field.description or ""
    assert "null: these parts have LISA's values, but with substrate.name=adapter the bank is device and" in method


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
