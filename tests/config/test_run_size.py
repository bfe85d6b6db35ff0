"""trainer/config/run_size.py: batch, steps and warm-up as they follow from the configuration."""

from typing import Any

import pytest

from trainer.config import ConfigError, RunConfig, resolve_batch, total_steps, warmup_steps


def config(*, schedule: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    return RunConfig(
        model={"path": "owner/name"},
        data={"train": "train.jsonl"},
        train={"steps": 100, "global_batch_size": 8, **train},
        schedule=schedule,
    )


def test_batch() -> None:
    batch = resolve_batch(config(micro_batch_size=2), 2)
    assert (batch.global_batch_size, batch.micro_batch_size, batch.accumulation_steps, batch.ranks) == (8, 2, 2, 2)


@pytest.mark.parametrize(
    ("micro", "ranks", "advice"),
    [
        (1, 3, "train.global_batch_size=6 or 9"),
        (4, 4, "train.global_batch_size=16, or train.micro_batch_size=2"),
        (2, 8, "train.global_batch_size=16, or train.micro_batch_size=1"),
    ],
)
def test_uneven_batch_names_the_nearest_valid_values(micro: int, ranks: int, advice: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_batch(config(micro_batch_size=micro), ranks)
    (found,) = error.value.problems
    assert found.startswith("train.global_batch_size: 8 is not a multiple of") and found.endswith(advice)


def test_steps() -> None:
    assert total_steps(config(), 5) == 100
    assert total_steps(config(steps=None, epochs=2.0), 17) == 5  # 34 samples in batches of 8
    assert total_steps(config(steps=None, epochs=2.0), 16) == 4
    # As floats, 0.14 * 400 is 56.00000000000001: one batch of 8 too many.
    assert total_steps(config(steps=None, epochs=0.14), 400) == 7
    with pytest.raises(ConfigError, match="data.train: 0 samples"):
        total_steps(config(steps=None, epochs=2.0), 0)


def test_warmup() -> None:
    assert warmup_steps(config(), 100) == 0
    assert warmup_steps(config(schedule={"warmup_steps": 7}), 100) == 7
    assert warmup_steps(config(schedule={"warmup_ratio": 0.03}), 110) == 4
