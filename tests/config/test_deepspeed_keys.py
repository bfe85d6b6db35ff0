"""trainer/config/deepspeed/keys.py: every table agrees with the installed DeepSpeed."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest

from trainer.config.deepspeed import keys as deepspeed_keys


class Recorder(dict):
    """A dictionary that notes which keys are asked for."""

    seen: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def keys(self) -> "Recorder":
        return self

    def __copy__(self) -> "Recorder":
        return self


@pytest.fixture
def asked() -> Iterator[set[str]]:
    Recorder.seen = set()
    yield Recorder.seen


def test_top_level_keys_are_those_that_deepspeed_asks_for(asked: set[str]) -> None:
    from deepspeed.runtime import config as deepspeed_source

    deepspeed_source.DeepSpeedConfig(Recorder(train_batch_size=1))
    # It also asks for keys that it has removed, in order to raise.
    assert asked - set(deepspeed_source._REMOVED_TOP_LEVEL_CONFIG_KEYS) == set(deepspeed_keys.TOP_LEVEL)


def test_data_types_keys_are_those_that_deepspeed_asks_for(asked: set[str]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    DeepSpeedConfig({"train_batch_size": 1, "data_types": Recorder()})
    assert asked == set(deepspeed_keys.DATA_TYPES)


def test_zero_keys_are_the_fields_of_deepspeeds_model() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    assert {name: field.alias for name, field in fields.items() if field.alias} == deepspeed_keys.ZERO_ALIASES
    assert set(deepspeed_keys.ZERO) == set(fields) | set(deepspeed_keys.ZERO_ALIASES.values())

    def fields_of(kind: type) -> set[str]:
        return {name for name, field in fields.items() if kind in (field.annotation, *get_args(field.annotation))}

    assert fields_of(int) == set(deepspeed_keys.ZERO_COUNTS)
    assert fields_of(bool) == set(deepspeed_keys.ZERO_FLAGS)


def test_keys_of_inner_blocks_are_the_fields_of_deepspeeds_models() -> None:
    from deepspeed.monitor.config import TensorBoardConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    for model, table in (
        (DeepSpeedZeroOffloadOptimizerConfig, deepspeed_keys.OFFLOAD_OPTIMIZER),
        (DeepSpeedBF16Config, deepspeed_keys.BF16),
        (TensorBoardConfig, deepspeed_keys.TENSORBOARD),
    ):
        assert set(model.model_fields) == set(table)
