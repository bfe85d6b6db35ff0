"""A valid configuration as settings of a command line, and the problems of its variations."""

from pathlib import Path

import pytest

from trainer.config import ConfigError, RunConfig, load

VALID = {
    "model.random": "{model_type: llama, hidden_size: 64}",
    "train.steps": "100",
    "train.global_batch_size": "8",
    "data.train": "train.jsonl",
}


def settings(*overrides: str, without: tuple[str, ...] = ()) -> list[str]:
    return [f"{key}={value}" for key, value in VALID.items() if key not in without] + list(overrides)


def config(*overrides: str, without: tuple[str, ...] = ()) -> RunConfig:
    return load(None, settings(*overrides, without=without))


def problems(*overrides: str, without: tuple[str, ...] = (), path: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(path, settings(*overrides, without=without))
    return error.value.problems


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)
