"""Configurations of runs with a DeepSpeed JSON of their own, and the problems found in them."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config import ConfigError, RunConfig
from trainer.config.deepspeed.resolve import resolve


def config(deepspeed: str = "zero3", *, dtype: str = "fp32", output: str = "runs/x", **train: Any) -> RunConfig:
    return RunConfig(
        model={"path": "owner/name", "dtype": dtype},
        train={"steps": 3, "global_batch_size": 8, **train},
        data={"train": "train.jsonl"},
        deepspeed=deepspeed,
        output=output,
    )


def write(folder: Path, values: dict[str, Any]) -> str:
    file = folder / "ds.json"
    file.write_text(json.dumps(values))
    return str(file)


def resolve_json(folder: Path, values: dict[str, Any], *, ranks: int = 2, **run: Any) -> dict[str, Any]:
    values.setdefault("zero_optimization", {"stage": 2})
    return resolve(config(write(folder, values), **run), ranks)


def problems(folder: Path, values: dict[str, Any], **run: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        resolve_json(folder, values, **run)
    return error.value.problems
