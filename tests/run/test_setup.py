"""trainer/run/setup.py: what a configuration may ask of a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from trainer.config import ConfigError
from trainer.run.setup import check_length


def _check(max_length: int, architecture: Any) -> None:
    check_length(SimpleNamespace(data=SimpleNamespace(max_length=max_length)), SimpleNamespace(config=architecture))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["xlnet", "bloom", "mamba"])
def test_a_model_without_a_limit_takes_any_length(family: str) -> None:
    _check(100_000, AutoConfig.for_model(family))


def test_a_length_over_the_positions_is_refused() -> None:
    _check(64, AutoConfig.for_model("llama", max_position_embeddings=64))
    with pytest.raises(ConfigError, match=r"data\.max_length: 65 tokens, but the model has 64 positions .*: 1 to 64"):
        _check(65, AutoConfig.for_model("llama", max_position_embeddings=64))
