"""Which changes of a configuration are tried when a run does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config import RunConfig
from trainer.planner.advice import _changes
from trainer.planner.machine import Machine


@pytest.mark.parametrize(
    ("selector", "bank", "banks"),
    [
        ({"name": "uniform", "blocks": 2}, "device", ["bank.name=cpu", "bank.name=discard"]),
        ({"name": "uniform", "blocks": 2}, "cpu", ["bank.name=discard"]),
        ({"name": "fixed", "blocks": [0, -1]}, "device", []),
        ({"name": "fixed", "blocks": [0, -1]}, "cpu", []),
        ({"name": "all"}, "device", []),
    ],
)
def test_another_bank_is_proposed_only_for_blocks_that_switch(
    selector: dict[str, Any], bank: str, banks: list[str]
) -> None:
    config = RunConfig.model_validate(
        {
            "model": {"random": {"model_type": "llama"}, "tokenizer": "bytes"},
            "data": {"train": "none.jsonl"},
            "train": {"steps": 6, "global_batch_size": 4},
            "selector": selector,
            "bank": {"name": bank},
        }
    )
    tried = [setting for change in _changes(config, Machine()) for setting in change.settings]
    assert [setting for setting in tried if setting.startswith("bank.")] == banks
